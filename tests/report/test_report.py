"""Reports: the terminal tables and the page say what was measured, escape what came from outside and fetch nothing."""

import dataclasses
import html.parser
import io
import math
import re
import warnings

import pytest
import torch
from rich.console import Console

from quantkit.errors import CalibrationError
from quantkit.evaluation import CoverageRow, Divergence, EvalReport, Footprint, Latency, Protocol, Quality
from quantkit.evaluation.latency import Speedup, Spread
from quantkit.evaluation.quality import QUANTILES
from quantkit.evaluation.record import describe_environment
from quantkit.report import comparison_table, coverage_table, render_html, write_html
from quantkit.report.cells import columns, megabytes, plus_minus, ppl_increase, protocol_lines, significant
from quantkit.report.findings import findings, headline
from quantkit.report.page import site_losses

MB = 1_000_000
EVIL = "<script>alert(1)</script> --> $x_$ [red]&\"'"


def make(
    label,
    *,
    bits=16.0,
    size=256.0,
    kl=0.001,
    increase=0.0009,
    error=0.0006,
    same=0.985,
    decode=41.2,
    speedup=None,
    base="float32",
):
    """Build a report with the given numbers."""
    quantiles = tuple((level, kl * (0.02 + 4 * level**3)) for level in QUANTILES)
    divergence = Divergence(
        20460, 20, kl, kl * 0.03, kl * 0.6, kl * 9, kl * 40, quantiles, same, 110, 55, math.log(19.1), 19.1, increase, error
    )
    ppl = 19.1 * math.exp(increase)
    spread = lambda v: Spread(v, v * 0.9, v * 1.1, v * 1.3)  # noqa: E731
    faster = None if speedup is None else Speedup("bf16", spread(speedup), spread(speedup))
    return EvalReport(
        label,
        Quality(20460, 20, math.log(ppl), 0.05, ppl, ppl * 0.05, 0.42, divergence),
        Protocol("some text", "ab" * 32, 1024, 1024, False, 20, 24, 20460, 20, 20460),
        Footprint(134_515_008, int(size * MB), int(size * MB), bits, bits, 0.0 if bits == 16 else 0.79, int((size + 2.5) * MB)),
        describe_environment(torch.bfloat16, torch.device("cpu")),
        Latency(256, 32, 5, 2, "cpu", spread(820.0), spread(decode), 612 * MB, faster),
        base,
    )


@pytest.fixture(scope="module")
def reports():
    return [
        make("bf16"),
        make("W8", bits=8.25, size=159.1, kl=0.0032, increase=0.0023, same=0.968, decode=22.1, speedup=1.87),
        make("W4 RTN g64", bits=4.31, size=108.9, kl=0.322, increase=0.247, error=0.007, same=0.713, decode=14.9, speedup=2.77),
        make(
            "W4 GPTQ g64", bits=4.31, size=108.9, kl=0.174, increase=0.169, error=0.005, same=0.794, decode=15.1, speedup=2.73
        ),
    ]


COVERAGE = [
    *(CoverageRow("quantized", f"l{i}", "Linear", 1000, 2000, 540, "int4 g64") for i in range(3)),
    CoverageRow("fell back", "l9", "Linear", 1000, 2000, 540, "int4 g64", "singular"),
    CoverageRow("skipped", "e", "Embedding", 2000, 4000, 4000, None, EVIL),
]
LOSSES = {f"model.layers.{b}.{k}": 0.001 * (b + 1) for b in range(12) for k in ("self_attn.q_proj", "mlp.down_proj")}


class Page(html.parser.HTMLParser):
    """Check that tags nest, and collect what a test wants to look at."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input", "wbr"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.links, self.ids, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self._note(tag, attrs)

    def handle_startendtag(self, tag, attrs):
        self._note(tag, attrs)

    def _note(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name.split(":")[-1] in ("src", "href", "srcset", "action"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def shown(table, width=120):
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


def test_the_page_is_well_formed_and_fetches_nothing(reports):
    text = render_html(reports, coverage=COVERAGE, losses=LOSSES)
    page = Page(text)
    inside = [link for link in page.links if link.startswith("#")]
    assert all(link.startswith("data:image/png;base64,") for link in page.links if link not in inside)
    assert set(re.findall(r"url\(([^)]*)\)", text)) == {f"#{i}" for i in re.findall(r"url\(#([^)]*)\)", text)}
    assert not re.search(r"https?:|@import|<link|<script|<img", text)
    assert len(page.ids) == len(set(page.ids)), "ids of different plots must not meet"
    assert {link[1:] for link in inside} <= set(page.ids)
    assert page.tags.count("svg") == 4
    assert page.tags.count("table") == 2


def test_plots_take_their_colours_from_the_page(reports):
    text = render_html(reports, losses=LOSSES)
    assert text.count("var(--ink)") > 20
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == 4
    for svg in svgs:
        assert not re.search(r"#0(10203|40506|70809)|fill: ?#000000|<text[^>]*fill: ?black", svg)


def test_everything_from_outside_is_escaped(reports):
    rows = [
        dataclasses.replace(r, label=f"{EVIL} {i}", base=EVIL, protocol=dataclasses.replace(r.protocol, source=EVIL))
        for i, r in enumerate(reports)
    ]
    text = render_html(rows, coverage=COVERAGE, losses={f"layers.{i}.{EVIL}": 0.1 + i for i in range(3)}, title=EVIL)
    page = Page(text)
    assert "script" not in page.tags
    assert "alert(1)" in text
    assert page.text.count(EVIL) >= 2  # title and heading: unescaped it reads the same again
    assert page.tags.count("svg") == 4


def test_names_are_not_tex(reports):
    text = render_html([dataclasses.replace(r, label="$x_$") for r in reports], losses={"layers.0.$x_$": 1, "layers.1.$x_$": 2})
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == 4
    assert all("$x_$" in svg for svg in svgs)


def test_names_in_other_scripts_are_drawn_without_complaint(reports):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = render_html([dataclasses.replace(r, label=f"模型 {i}") for i, r in enumerate(reports)])
    assert "模型 3" in "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))


def test_the_same_reports_give_the_same_bytes(reports, tmp_path):
    write_html(tmp_path / "a.html", reports, coverage=COVERAGE, losses=LOSSES, title="T")
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == render_html(
        reports, coverage=COVERAGE, losses=LOSSES, title="T"
    )


def test_the_page_shows_the_numbers(reports):
    text = "".join(Page(render_html(reports, coverage=COVERAGE)).text)
    for expected in (
        "22.62 ± 1.13",
        "0.174 ± 0.005",
        "+18.4 ± 0.6",
        "79.4",
        "110 / 55",
        "2.73x",
        "111.4",
        "some text",
        "singular",
    ):
        assert expected in text
    assert "quantized 50.0 %" in text
    assert "fell back 16.7 %" in text


def test_what_was_not_measured_is_left_out(reports):
    bare = [dataclasses.replace(r, latency=None, quality=dataclasses.replace(r.quality, divergence=None)) for r in reports]
    text = render_html(bare)
    assert "<svg" not in text
    assert not {"KL", "decode ms", "speed-up"} & {column.title for column in columns(bare)}
    assert "Coverage" not in text
    assert "Loss by site" not in text
    mixed = render_html([bare[0], *reports[1:]])
    assert mixed.count("<svg") == 3


def test_a_model_equal_to_its_base_does_not_break_the_logarithms(reports):
    same = make("same", kl=0.0, increase=0.0, error=0.0, same=1.0)
    assert render_html([same]).count("<svg") == 0
    assert render_html([same, *reports]).count("<svg") == 3
    assert [column.cell(same) for column in columns([same]) if column.title in ("vs base %", "KL", "KL p99")] == ["0"] * 3
    assert findings([same]) == ["same: perplexity 0 % against float32, within noise."]


def test_no_report_is_an_error(tmp_path):
    with pytest.raises(CalibrationError, match="no evaluation report"):
        write_html(tmp_path / "x.html", [])
    with pytest.raises(CalibrationError, match="no evaluation report"):
        comparison_table([])
    assert not list(tmp_path.iterdir())


def test_the_headline_names_the_smallest_model_with_the_least_loss(reports):
    assert headline(reports) == (
        "W4 GPTQ g64 takes 108.9 MB, 2.4 times less than bf16, and decodes 2.73 times as fast; it ranks the same token first "
        "as float32 for 79.4 % of tokens (KL 0.174 nats), and perplexity goes from 19.10 to 22.62."
    )
    assert headline(reports[:1]) == "bf16 has perplexity 19.12 ± 0.96 and takes 256.0 MB."
    assert "times" not in headline(reports[1:2])
    alone = dataclasses.replace(reports[3], quality=dataclasses.replace(reports[3].quality, divergence=None))
    assert headline([alone]).endswith("its perplexity is 22.62 ± 1.13.")


def test_findings_weigh_differences_against_their_paired_error(reports):
    assert findings(reports) == [
        "bf16: perplexity +0.09 ± 0.06 % against float32, within noise.",
        "W8: perplexity +0.23 ± 0.06 % against float32, beyond noise.",
        "W4 RTN g64: perplexity +28.0 ± 0.9 % against float32, beyond noise.",
        "W4 GPTQ g64: perplexity +18.4 ± 0.6 % against float32, beyond noise.",
        "W4 GPTQ g64 has 46 % less KL than W4 RTN g64 at the same bits per weight.",
    ]


def test_the_paired_increase_is_the_ratio_of_perplexities(reports):
    increase, error = ppl_increase(reports[3])
    assert increase == pytest.approx(100 * (reports[3].quality.perplexity / 19.1 - 1))
    assert error == pytest.approx(100 * math.exp(0.169) * 0.005)


def test_the_terminal_table_has_every_model_and_says_how_it_was_measured(reports):
    text = shown(comparison_table(reports, title="Demo"), 130)
    for expected in ("Demo", "bf16", "W4 GPTQ g64", "22.62 ± 1.13", "0.174", "79.4", "15.10", "820", "612", "20 of 24 windows"):
        assert expected in text
    assert "[red]" in shown(comparison_table([dataclasses.replace(reports[0], label="a[red]b")]))
    narrow = shown(comparison_table(reports), 70)
    assert max(map(len, narrow.splitlines())) <= 70
    assert "…" not in narrow


def test_rows_on_different_text_are_called_incomparable(reports):
    other = dataclasses.replace(reports[1], protocol=dataclasses.replace(reports[1].protocol, fingerprint="cd" * 32))
    assert protocol_lines([reports[0], other])[0].startswith("Rows were scored on different text")
    assert not protocol_lines(reports)[0].startswith("Rows")
    assert "cannot be compared" in render_html([reports[0], other])


def test_the_protocol_is_stated_in_words(reports):
    protocol = Protocol("x.txt", "00", 512, 256, True, 30, 99, 15330, 20, 10220)
    line = protocol_lines([dataclasses.replace(reports[0], protocol=protocol)])[0]
    assert line == (
        "Text: x.txt; 30 of 99 windows of 512 tokens, stride 256, each with a BOS token; 15,330 tokens scored; "
        "compared with the base on 10,220."
    )
    assert (
        "stride" not in protocol_lines([dataclasses.replace(reports[0], protocol=dataclasses.replace(protocol, stride=511))])[0]
    )


def test_the_coverage_table_adds_up():
    text = shown(coverage_table(COVERAGE), 140)
    for expected in ("quantized", "fell back", "skipped", "int4 g64", "singular", "[red]", "total", "6,000"):
        assert expected in text
    assert "total" in shown(coverage_table([]))


def test_sites_are_split_into_block_and_kind():
    assert site_losses({"model.layers.3.mlp.down_proj": 0.5, "lm_head": 0.1}) == [
        ("model.layers.3.mlp.down_proj", "mlp.down_proj", 3, 0.5),
        ("lm_head", "lm_head", 0, 0.1),
    ]
    rows = [{"site": "transformer.h.11.attn.c_attn", "block": 11, "loss": 0.25}]
    assert site_losses(rows) == [("transformer.h.11.attn.c_attn", "attn.c_attn", 11, 0.25)]


def test_losses_of_many_blocks_and_of_none(reports):
    many = {f"layers.{b}.up": 0.01 for b in range(200)}
    Page(render_html(reports[:1], losses=many))
    assert "Loss by site" not in render_html(reports[:1], losses={"layers.0.up": 0.0})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.174, "0.174"),
        (22.61, "22.6"),
        (0.0021, "0.00210"),
        (3.21e-6, "3.21e-06"),
        (123456.0, "123456"),
        (2e9, "2.00e+09"),
    ],
)
def test_significant_digits(value, text):
    assert significant(value) == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((22.61, 1.22, 2), "22.61 ± 1.22"),
        ((0.174, 0.0052), "0.174 ± 0.005"),
        ((0.2, 0.15, 1), "0.20 ± 0.15"),
        ((0.0011, 3.3e-5), "0.00110 ± 0.00003"),
        ((22.61, None), "22.61"),
        ((0.0, 0.0), "0"),
        ((5.0, 0.0), "5.000 ± 0"),
        ((2e-9, 1e-9), "2.00e-09 ± 1e-09"),
    ],
)
def test_values_with_errors(arguments, text):
    assert plus_minus(*arguments) == text


def test_mebibytes():
    assert (megabytes(256.04 * MB), megabytes(15_258.6 * MB)) == ("256.0", "15,259")
