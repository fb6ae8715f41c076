"""Token ids in, token ids out: sampling and the generation loop. Knows torch, no model class and no tokenizer."""
