"""Tokens that are parts of characters: log probabilities spell them byte by byte."""

from transformers import PreTrainedTokenizerFast

from quantkit.engine.request import Logprob
from quantkit.serve.grammar import Grammars
from quantkit.serve.intake import Accepted
from quantkit.serve.reply import Spelling


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with <eos> and one token for each byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<eos>": 0, **{letter: 1 + i for i, letter in enumerate(letters)}}, []))
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_parts_of_characters_and_where_they_begin():
    tokenizer = byte_tokenizer()
    grammars = Grammars(tokenizer, [0])
    text = "aé😀b"
    ids = [*tokenizer(text)["input_ids"], 0]
    spelling = Spelling(tokenizer, Accepted(None, [], grammars=grammars))
    known = [(token, Logprob(-1.0, [(token, -1.0)])) for token in ids]
    rows = spelling.chat(known)["content"]
    assert b"".join(bytes(row["bytes"] or ()) for row in rows).decode() == text
    assert rows[0]["token"] == "a"
    assert rows[1]["token"] == r"bytes:\xc3"
    assert rows[1]["top_logprobs"][0]["bytes"] == [0xC3]
    assert (rows[-1]["token"], rows[-1]["bytes"]) == ("<eos>", None)
    assert spelling.text(known)["text_offset"] == [0, 1, 1, 2, 2, 2, 2, 3, 4]
    grammars.close()
