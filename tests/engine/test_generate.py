"""Prompts, stop strings, chat templates, and text that arrives in pieces."""

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quantkit.engine.sampling import Sampling
from quantkit.errors import QuantkitError
from quantkit.generation.generate import Generation, end_tokens, generate
from quantkit.generation.text import TextStream, encode_prompt
from tests.tiny import FAMILIES, build, tiny_llama, tiny_tokenizer

NASTY = "naïve café — “日本語” 👩‍👩‍👧‍👦 🏳️‍🌈 x\u0301 \ufffd . end"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, as GPT-2 spells bytes: every non-ASCII character takes several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate([*alphabet, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Characters where known, bytes otherwise, words marked by a leading '▁': the layout of Llama 2 and Gemma."""
    symbols = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz."]
    tokenizer = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def stream_text(tokenizer, ids, stops=()) -> tuple[list[str], str, int]:
    pieces: list[str] = []
    stream = TextStream(tokenizer, stops, pieces.append)
    taken = next((i + 1 for i, token in enumerate(ids) if stream.add(token)), len(ids))
    return pieces, stream.finish(), taken


@pytest.mark.parametrize("make", [byte_tokenizer, fallback_tokenizer])
def test_streamed_pieces_are_whole_characters_and_join_to_the_text(make):
    tokenizer = make()
    ids = tokenizer(NASTY)["input_ids"]
    assert len(ids) > len(NASTY) + 20
    pieces, text, _ = stream_text(tokenizer, ids)
    assert "".join(pieces) == text == tokenizer.decode(ids, skip_special_tokens=True) == NASTY
    assert all(piece == "\ufffd" or "\ufffd" not in piece.strip("\ufffd") for piece in pieces)
    assert len(pieces) > 30  # it did stream


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    tokenizer = byte_tokenizer()
    ids = tokenizer("ab日")["input_ids"][:-1]
    pieces, text, _ = stream_text(tokenizer, ids)
    assert pieces[:2] == ["a", "b"]
    assert text == tokenizer.decode(ids)
    assert text.endswith("\ufffd")


def test_special_tokens_are_not_text():
    tokenizer = byte_tokenizer()
    ids = [*tokenizer("ab")["input_ids"], tokenizer.eos_token_id, *tokenizer("cd")["input_ids"], tokenizer.eos_token_id]
    assert stream_text(tokenizer, ids)[:2] == (["a", "b", "c", "d"], "abcd")


@pytest.mark.parametrize(
    ("stops", "want"),
    [
        (["\nUser:"], "one two"),
        (["two", "one tw"], "one "),
        (["\n\n"], "one two\nUser: hi\nUs"),
        (["er: hi\nUs"], "one two\nUs"),
    ],
)
def test_stop_strings_cut_the_text_and_are_never_shown(stops, want):
    tokenizer, said = byte_tokenizer(), "one two\nUser: hi\nUs"
    pieces, text, taken = stream_text(tokenizer, tokenizer(said)["input_ids"], stops)
    if stops == ["two", "one tw"]:
        want = ""  # "one tw" is complete before "two"
    assert "".join(pieces) == text == want
    first = min((said.find(stop) + len(stop) for stop in stops if stop in said), default=len(said))
    assert taken == first


def test_generate_text_equals_transformers():
    model, tokenizer = FAMILIES["llama"](), tiny_tokenizer()
    encoded = tokenizer("the cat sat on", return_tensors="pt")
    want = model.generate(**encoded, max_new_tokens=24, do_sample=False)[0, encoded["input_ids"].shape[1] :].tolist()
    pieces: list[str] = []
    done = generate(model, "the cat sat on", tokenizer, max_new_tokens=24, stream=pieces.append)
    assert done.ids == want
    assert done.text == "".join(pieces) == tokenizer.decode(want, skip_special_tokens=True)
    assert (done.prompt_tokens, done.finish_reason, len(done.decode_ms)) == (encoded["input_ids"].shape[1], "length", 23)


def test_prompts_as_ids_are_the_same_prompt():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    ids = tokenizer("the cat sat on")["input_ids"]
    texts = [
        generate(model, p, tokenizer, max_new_tokens=6).ids
        for p in ("the cat sat on", ids, torch.tensor(ids), torch.tensor([ids]))
    ]
    assert all(text == texts[0] for text in texts)
    assert generate(model, ids, max_new_tokens=6).text is None
    assert generate(model, torch.tensor(ids, dtype=torch.int32), max_new_tokens=6).ids == texts[0]


def test_messages_go_through_the_chat_template():
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "sat on"}]
    with pytest.raises(QuantkitError, match="no chat template"):
        encode_prompt(messages, tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} .{% endfor %}{% if add_generation_prompt %} the{% endif %}"
    )
    assert encode_prompt(messages, tokenizer).tolist() == tokenizer("sat on . the")["input_ids"]
    assert (
        generate(tiny_llama(), messages, tokenizer, max_new_tokens=3).ids
        == generate(tiny_llama(), "sat on . the", tokenizer, max_new_tokens=3).ids
    )


def test_the_models_end_tokens_and_the_users_stop_the_answer():
    model, ids = tiny_llama(), [5, 6, 7]
    free = generate(model, ids, max_new_tokens=12).ids
    model.generation_config.eos_token_id = [free[5], free[7]]
    assert end_tokens(model) == [free[5], free[7]]
    done = generate(model, ids, max_new_tokens=12)
    assert (done.ids, done.finish_reason) == (free[: free.index(free[5]) + 1], "stop")
    theirs = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, 3), max_new_tokens=12, do_sample=False)
    assert done.ids == theirs[0, 3:].tolist()
    assert generate(model, ids, max_new_tokens=12, stop=free[1]).ids == free[: free.index(free[1]) + 1]
    assert generate(model, ids, max_new_tokens=12, stop=[free[1]]).finish_reason == "stop"
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert end_tokens(model) == []


def test_a_stop_string_ends_the_answer():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    free = generate(model, "the cat", tokenizer, max_new_tokens=16)
    assert free.text is not None
    stop = free.text[5:8]
    done = generate(model, "the cat", tokenizer, max_new_tokens=16, stop=stop)
    assert done.text == free.text[: free.text.find(stop)]
    assert done.finish_reason == "stop"
    assert done.ids == free.ids[: len(done.ids)]
    assert len(done.ids) < 16


def test_sampling_is_seeded_and_reaches_the_engine():
    model = tiny_llama()
    sampled: list[Generation] = [generate(model, [5, 6], temperature=1.5, seed=seed, max_new_tokens=16) for seed in (1, 1, 2)]
    assert sampled[0].ids == sampled[1].ids != sampled[2].ids
    greedy = generate(model, [5, 6], max_new_tokens=16).ids
    assert generate(model, [5, 6], temperature=1.5, top_k=1, seed=1, max_new_tokens=16).ids == greedy
    assert generate(model, [5, 6], temperature=1.5, top_p=1e-6, seed=1, max_new_tokens=16).ids == greedy
    assert generate(model, [5, 6], temperature=1.5, min_p=1.0, seed=1, max_new_tokens=16).ids == greedy
    assert Sampling(repetition_penalty=2.0).greedy
    assert generate(model, [5, 6], repetition_penalty=5.0, max_new_tokens=16).ids != greedy


def test_dropout_is_off_meanwhile_and_modes_come_back():
    model = build("gpt2", num_key_value_heads=None, head_dim=None, intermediate_size=None, resid_pdrop=0.5, embd_pdrop=0.5)
    want = generate(model, [5, 6], max_new_tokens=12).ids
    model.train()
    model.transformer.h[0].eval()
    assert generate(model, [5, 6], max_new_tokens=12).ids == want
    assert model.training
    assert model.transformer.h[1].training
    assert not model.transformer.h[0].training


def test_interrupt_while_streaming_leaves_the_model_usable():
    model, tokenizer = tiny_llama().train(), tiny_tokenizer()
    want = generate(model, "the cat", tokenizer, max_new_tokens=8)

    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, "the cat", tokenizer, max_new_tokens=8, stream=interrupt)
    assert model.training
    assert generate(model, "the cat", tokenizer, max_new_tokens=8).ids == want.ids


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("text", {}, "give the model's tokenizer"),
        ([], {}, "prompt is empty"),
        ([1, 192], {}, r"token ids from 1 to 192, the model knows 0 to 191"),
        ([-1], {}, "token ids from -1"),
        ([1] * 120, {}, r"make 129, more than the limit of 128.*at most 8 new"),
        (torch.ones(2, 3, dtype=torch.int64), {}, "for several prompts give a list"),
        (torch.ones(3), {}, "want integer ids"),
        ([1], {"stop": "x"}, "a stop string needs text"),
        ([1], {"stream": print}, "stream needs text"),
        ([1], {"stop": [""]}, "non-empty string or a token id"),
        ([1], {"top_k": 3}, "top_k: no effect on greedy"),
        ([1], {"temperature": -1.0}, "temperature=-1.0"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_bad_requests_are_named(prompt, options, message):
    with pytest.raises(QuantkitError, match=message):
        generate(tiny_llama(), prompt, **{"max_new_tokens": 9, **options})


@pytest.mark.parametrize("prompt", [3.5, [1, "a"], {"role": "user"}])
def test_prompts_of_another_type_are_named(prompt):
    with pytest.raises(QuantkitError, match="want text, token ids, or messages"):
        encode_prompt(prompt, tiny_tokenizer())


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_are_a_limit_whatever_the_config_says(family):
    model = FAMILIES[family]()
    model.config.max_position_embeddings = 4096
    assert len(generate(model, [5] * 125, max_new_tokens=3).ids) == 3
    with pytest.raises(QuantkitError, match="more than the limit of 128;"):
        generate(model, [5] * 126, max_new_tokens=3)
