"""What outlier channels do to 8-bit activations, and what the transforms do about them.

    python benchmarks/outliers.py --model demo --factor 1 64 --transform none smoothquant rotate

``--factor`` plants outliers that change nothing else: in every norm whose output only linear layers read, ``--channels`` evenly
spread channels get that many times their gain, and the layers' columns the inverse. The model computes what it did, but each
token now has channels that far above the rest. Then the model is quantized to ``--scheme`` by rounding to nearest, after each
transform in turn, and compared with the float one: KL in nats per token and agreement.
"""

import argparse
import copy

import torch

from quantkit import Calibration, quantize
from quantkit.calibrate.texts import encoder, load_texts, text_default
from quantkit.checkpoint.open import open_model
from quantkit.evaluation import BaseLogits, score
from quantkit.evaluation.windows import cut_windows
from quantkit.hf.structure import describe
from quantkit.transforms.scaling_groups import find_groups, rescale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--scheme", nargs="+", default=["w8a8"])
    parser.add_argument("--factor", nargs="+", type=int, default=[1, 64], help="powers of two, so that nothing is rounded")
    parser.add_argument("--transform", nargs="+", default=["none", "smoothquant", "rotate"])
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--data", help="calibration text")
    parser.add_argument("--eval-data", help="evaluation text")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    base, tokenizer = open_model(arguments.model, torch.float32)
    compared = BaseLogits(base)
    texts = load_texts(arguments.eval_data) if arguments.eval_data else text_default()[1]
    tokens = torch.tensor([token for text in texts for token in encoder(tokenizer)(text)])
    windows = cut_windows(tokens, length=arguments.length, count=arguments.windows)
    print(f"{'scheme':16}{'factor':>8}  {'transform':14}{'KL':>10}{'KL p99':>10}{'top-1 %':>10}")
    for scheme in arguments.scheme:
        for factor in arguments.factor:
            for transform in arguments.transform:
                model = planted(base, factor, arguments.channels)
                quantize(
                    model, scheme, method="rtn", steps=() if transform == "none" else (transform,), tokenizer=tokenizer,
                    calibration=Calibration(arguments.data, arguments.samples, arguments.length),
                )  # fmt: skip
                found = score(model, windows, compared).divergence
                assert found is not None
                values = f"{found.mean:10.5f}{found.p99:10.4f}{100 * found.same_top1:10.2f}"
                print(f"{scheme:16}{factor:8}  {transform:14}{values}", flush=True)


def planted(base: torch.nn.Module, factor: int, channels: int) -> torch.nn.Module:
    """Return a copy of ``base`` whose norms have ``channels`` outliers each."""
    model = copy.deepcopy(base)
    structure = describe(model)
    with torch.no_grad():
        for group in find_groups(model, structure, {site.name: site for site in structure.sites}):
            if group.site is None:  # the producer is a norm
                factors = torch.ones(group.readers[0].in_features)
                factors[:: len(factors) // channels] = 1 / factor
                rescale(model, group, factors)
    return model


if __name__ == "__main__":
    main()
