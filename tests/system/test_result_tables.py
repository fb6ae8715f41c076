"""Tables for notebooks: text is shown as it is, and pandas is used only where it is there."""

import builtins

import pytest

from quantkit.system.tables import Rows, facts_html, frame, table_html


def test_text_stays_text():
    assert "&lt;b&gt;" in facts_html({"<b>": "<i>"}, "<u>")
    assert "<b>" not in facts_html({"<b>": "<i>"}, "<u>").replace("<table>", "")
    shown = table_html(["a<"], [["x<y", 0.123456, None, 7]])
    assert all(text in shown for text in ("a&lt;", "x&lt;y", "0.1235", "></td>", ">7<"))


def test_a_long_table_says_how_much_is_left_out():
    shown = table_html(["n"], [[n] for n in range(300)])
    assert shown.count("<tr>") == 201
    assert "100 more rows" in shown


def test_a_frame_is_pandas_where_there_is_pandas(monkeypatch):
    rows = [{"a": 1, "b": None}, {"a": 2, "b": "x"}]
    pandas = pytest.importorskip("pandas")
    assert isinstance(frame(rows), pandas.DataFrame)
    assert list(frame(rows)["a"]) == [1, 2]
    imported = builtins.__import__

    def without(name, *arguments, **options):
        if name == "pandas":
            raise ImportError(name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    plain = frame(rows)
    assert isinstance(plain, Rows)
    assert plain == rows
    assert "<th" in plain._repr_html_()
    assert Rows()._repr_html_().startswith("<table>")
