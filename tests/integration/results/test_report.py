"""Plots and the HTML report, for results constructed in the tests."""

import base64
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from eva_peft.errors import EvaError
from eva_peft.results import plots, report
from eva_peft.results.result import EvaResult

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")
VOID = {"meta", "img"}


def llama_names(blocks: int) -> list[str]:
    return [f"model.layers.{i}.{module}" for i in range(blocks) for module in MODULES]


def make_result(names: Sequence[str], steps: int = 3, components: int = 6) -> EvaResult:
    """Build a result; only layers named q_proj and k_proj share an input."""
    generator = torch.Generator().manual_seed(0)
    ratios: dict[str, torch.Tensor] = {}
    for name in names:
        twin = name.replace("k_proj", "q_proj")
        drawn = torch.rand(components, generator=generator).sort(descending=True).values
        ratios[name] = ratios.get(twin, 0.9 * drawn / drawn.sum())
    similarity: list[Any] = [None]
    for step in range(1, steps):
        similarity.append([1 - 10.0 ** -(step + i / len(names)) for i in range(len(names))])
    return EvaResult(
        ranks={name: i % (components + 1) for i, name in enumerate(names)},
        components={name: torch.zeros(components, 8) for name in names},
        singular_values={name: ratio.sqrt() for name, ratio in ratios.items()},
        explained_variance_ratio=ratios,
        converged=dict.fromkeys(names, True),
        numerical_rank=dict.fromkeys(names, components),
        lost_variance=dict.fromkeys(names, 1.25e-3),
        method=dict.fromkeys(names, "sketch"),
        in_features=dict.fromkeys(names, 8),
        out_features=dict.fromkeys(names, 8),
        base_ranks=dict.fromkeys(names, 2),
        alphas=dict.fromkeys(names, 8.0),
        shared_inputs=[[n.replace("k_proj", "q_proj"), n] for n in names if "k_proj" in n],
        tokens=4321,
        skipped_tokens=0,
        steps=steps,
        forwards=steps + 1,
        seconds={"forward": 2.0, "accumulate": 1.0, "fold": 0.5, "check": 0.25, "total": 4.0},
        peak_memory_bytes=3 * 2**20,
        history={
            "step": list(range(1, steps + 1)),
            "forwards": list(range(1, steps + 1)),
            "tokens": [100 * (step + 1) for step in range(steps)],
            "seconds": [0.1 * (step + 1) for step in range(steps)],
            "converged": [min(step, len(names)) for step in range(steps)],
            "similarity": similarity,
        },
        metadata={"model": "some/model", "lora_config": {"r": 2, "eva_config": {"tau": 0.99}}},
    )


FLAT = make_result(["0", "2"], steps=2)
SMALL = make_result(llama_names(3))
NO_STEPS = make_result(llama_names(1), steps=1)
RESULTS = {
    "small": SMALL,
    "large": make_result(llama_names(32), steps=50),
    "flat": FLAT,
    "one step": NO_STEPS,
    "empty": make_result([], steps=0),
    "unlike": make_result(["encoder.layer.0.output.dense", "lm_head"], steps=2, components=1),
}
PLOTS = [
    plots.plot_ranks,
    plots.plot_explained_variance,
    plots.plot_convergence,
    plots.plot_cost,
    plots.plot_result,
]


def texts_of(figure: Figure) -> list[str]:
    """Return every text of a figure that can be seen."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    return [t.get_text() for t in figure.findobj(Text) if t.get_visible() and t.get_text()]


@pytest.mark.parametrize("kind", RESULTS)
@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.__name__)
def test_every_plot_draws_every_result(plot: Any, kind: str) -> None:
    figure = plot(RESULTS[kind])
    assert figure.get_label()
    assert texts_of(figure)


@pytest.mark.parametrize("plot", PLOTS[1:4], ids=lambda plot: plot.__name__)
def test_axes_are_labelled(plot: Any) -> None:
    words = " ".join(texts_of(plot(SMALL)))
    expected = {
        "plot_explained_variance": ["components", "cumulative share of variance"],
        "plot_convergence": ["step", "layers converged", "|cos|", "tau = 0.99", "slowest layer"],
        "plot_cost": ["seconds", "forward", "other", "peak memory beyond the model 3.0 MiB"],
    }[plot.__name__]
    assert [word for word in expected if word not in words] == []


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Return pairs of visible texts whose boxes overlap by more than a point."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    found = [
        (t.get_text(), t.get_window_extent().padded(-1.0))
        for t in figure.findobj(Text)
        if t.get_visible() and t.get_text().strip()
    ]
    found = [(text, box) for text, box in found if box.width > 0 and box.height > 0]
    return [
        (first, second)
        for i, (first, one) in enumerate(found)
        for second, two in found[i + 1 :]
        if one.overlaps(two) and one.bounds != two.bounds
    ]


@pytest.mark.parametrize("kind", ["small", "large", "flat", "unlike"])
def test_texts_do_not_overlap(kind: str) -> None:
    assert overlapping(plots.plot_result(RESULTS[kind])) == []


def test_rank_heat_map_shows_every_rank() -> None:
    axes = plots.plot_ranks(SMALL).axes[0]
    image = np.asarray(axes.images[0].get_array())
    assert image.shape == (4, 3)
    for i, name in enumerate(SMALL.ranks):
        assert image[i % 4, i // 4] == SMALL.ranks[name]
    assert [t.get_text() for t in axes.get_yticklabels()] == [m.split(".")[1] for m in MODULES]
    assert [t.get_text() for t in axes.texts] == [f"{rank:.0f}" for rank in image.flatten()]


def test_crowded_heat_map_omits_the_numbers() -> None:
    names = [f"blocks.{i}.experts.{e}.up" for i in range(4) for e in range(300)]
    axes = plots.plot_ranks(make_result(names, steps=1, components=200)).axes[0]
    assert axes.images[0].get_array().shape == (300, 4)
    assert not axes.texts


def test_layers_without_a_block_have_their_own_column() -> None:
    result = make_result(["model.layers.0.fc", "model.layers.1.fc", "lm_head"])
    axes = plots.plot_ranks(result).axes[0]
    image = np.ma.asarray(axes.images[0].get_array())
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "1", "none"]
    assert image.mask.tolist() == [[False, False, True], [True, True, False]]
    flat = plots.plot_ranks(FLAT).axes[0]
    assert flat.images[0].get_array().shape == (2, 1)
    assert flat.get_xlabel() == "layers without a block index"


def test_explained_variance_shows_median_range_and_rank() -> None:
    result = make_result(["m.0.fc", "m.1.fc", "m.2.fc"])
    (axes,) = plots.plot_explained_variance(result).axes
    curves = np.stack([result.explained_variance_ratio[n].double().cumsum(0) for n in result.ranks])
    line, dot = axes.lines
    np.testing.assert_allclose(line.get_ydata(), np.median(curves, axis=0))
    assert dot.get_xdata() == [1.0]
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(curves.max())
    assert band[:, 1].min() == pytest.approx(curves.min())


def test_kinds_with_a_shared_input_share_a_curve() -> None:
    titles = [axes.get_title() for axes in plots.plot_explained_variance(SMALL).axes]
    assert titles == ["q_proj, k_proj", "o_proj", "down_proj"]


def test_layers_of_different_width_share_an_axis() -> None:
    result = make_result(["m.0.fc", "m.1.fc"])
    result.explained_variance_ratio["m.0.fc"] = torch.tensor([0.6, 0.4])
    (axes,) = plots.plot_explained_variance(result).axes
    assert len(axes.lines[0].get_ydata()) == 6
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(0.95)


def test_many_kinds_are_grouped_by_the_last_name() -> None:
    names = [f"m.0.experts.{e}.{part}" for e in range(6) for part in ("up", "down")]
    titles = [a.get_title() for a in plots.plot_explained_variance(make_result(names)).axes]
    assert titles == ["up", "down"]
    names = [f"part{i}" for i in range(9)]
    (axes,) = plots.plot_explained_variance(make_result(names)).axes
    assert axes.get_title() == "all layers"


def test_convergence_shows_counts_and_quantiles() -> None:
    upper, lower = plots.plot_convergence(SMALL).axes
    assert upper.lines[0].get_ydata().tolist() == [0, 1, 2]
    distance = 1 - np.asarray(SMALL.history["similarity"][1:])
    median, slowest, tau = lower.lines
    np.testing.assert_allclose(slowest.get_ydata(), distance.max(axis=1))
    np.testing.assert_allclose(median.get_ydata(), np.median(distance, axis=1))
    assert median.get_xdata().tolist() == [2, 3]
    assert tau.get_ydata() == pytest.approx([0.01, 0.01])
    assert lower.get_ylim()[0] > lower.get_ylim()[1], "high similarity belongs at the top"


def test_missing_similarities_are_omitted() -> None:
    result = make_result(["a", "b", "c"], steps=3)
    result.history["similarity"] = [None, [0.5, None, float("nan")], [None, None, None]]
    _, lower = plots.plot_convergence(result).axes
    assert lower.lines[0].get_xdata().tolist() == [2]
    assert lower.lines[0].get_ydata().tolist() == [0.5]
    assert len(plots.plot_convergence(NO_STEPS).axes) == 1


def test_phases_add_up_to_the_total() -> None:
    phases = plots.phase_seconds(SMALL)
    assert list(phases) == ["forward", "accumulate", "fold", "check", "other"]
    assert sum(phases.values()) == SMALL.seconds["total"]
    widths = [bar.get_width() for bar in plots.plot_cost(SMALL).axes[0].patches]
    assert widths == list(phases.values())


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**40, "1.0 TiB"), (-2048, "-2.0 KiB")],
)
def test_bytes_have_units(count: int, text: str) -> None:
    assert plots.format_bytes(count) == text


def test_png_and_svg_are_written(tmp_path: Path) -> None:
    plots.save_result_plot(SMALL, tmp_path / "a.PNG")
    with Image.open(tmp_path / "a.PNG") as image:
        assert image.format == "PNG"
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    SMALL.plot(tmp_path / "a.svg")
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()


@pytest.mark.parametrize(
    ("write", "name"), [(EvaResult.plot, "a.png"), (EvaResult.to_html, "a.html")]
)
def test_missing_folders_are_created(write: Any, name: str, tmp_path: Path) -> None:
    write(SMALL, tmp_path / "new" / "folder" / name)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.pdf", "a", "a.html"])
def test_other_suffixes_are_errors(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.svg") as caught:
        plots.save_result_plot(SMALL, tmp_path / name)
    assert isinstance(caught.value, EvaError)
    assert list(tmp_path.iterdir()) == []


def test_pyplot_is_not_imported() -> None:
    code = (
        "import sys; from eva_peft.results import plots, report; "
        "assert 'matplotlib' not in sys.modules; "
        "plots.require_matplotlib()(); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Page(HTMLParser):
    """Collects elements and texts, and checks that every element is closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_page_is_valid_and_self_contained(tmp_path: Path) -> None:
    SMALL.to_html(tmp_path / "a.html")
    source = (tmp_path / "a.html").read_text(encoding="utf-8")
    page = Page(source)
    assert source.startswith("<!DOCTYPE html>")
    assert {"link", "script", "iframe"}.isdisjoint(tag for tag, _ in page.elements)
    addresses = [a.get("src") or a.get("href") or "" for _, a in page.elements]
    assert all(a.startswith(("data:image/svg+xml;base64,", "#")) for a in addresses if a)
    assert "url(" not in source
    assert "@import" not in source
    assert "prefers-color-scheme: dark" in source
    assert "@media print" in source
    anchors = {a["href"] for a in page.named("a")}
    assert anchors == {f"#{section['id']}" for section in page.named("section")}
    assert [a["alt"] for a in page.named("img")] == [
        plot(SMALL).get_label() for plot in (PLOTS[0], PLOTS[1], PLOTS[2], PLOTS[3])
    ]


def test_sections_show_the_numbers() -> None:
    sections = dict(report.result_sections(SMALL))
    assert list(sections)[:5] == [
        "Summary",
        "Ranks",
        "Explained variance",
        "Convergence",
        "Time and memory",
    ]
    summary = Page(sections["Summary"]).text
    total = f"{sum(SMALL.ranks.values())}total rank (0 to 6 per layer)"
    for part in ("12layers", total, "12 / 12", "4,321", "4 s", "3.0 MiB", "0.0013"):
        assert part in summary, part
    layers = Page(sections["Layers"])
    assert len(layers.named("tr")) == 1 + len(SMALL.ranks)
    name = "model.layers.1.mlp.down_proj"
    row = re.search(rf"<tr><td>{name}</td>.*?</tr>", sections["Layers"])
    assert row is not None
    share = 100 * float(SMALL.explained_variance_ratio[name][: SMALL.ranks[name]].sum())
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row[0])
    assert cells[1] == "0" if SMALL.ranks[name] == 0 else str(SMALL.ranks[name])
    assert float(cells[2]) == pytest.approx(share, abs=0.01)
    assert cells[3:] == ["0.00125", "6", "8", "sketch", "yes", "–"]
    assert "&quot;tau&quot;: 0.99" in sections["Metadata"]


def test_summary_shows_problems() -> None:
    result = make_result(["a", "b", "c"])
    assert 'class="warn"' not in report.result_sections(result)[0][1]
    result.converged["b"] = False
    result.skipped_tokens = 7
    result.uncalled = ["lost.layer"]
    summary = report.result_sections(result)[0][1]
    assert "1 of 3 layers had not converged" in summary
    assert "7 tokens with NaN or infinite values" in summary
    assert "lost.layer" in summary


def test_external_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&\""
    result = make_result([f"blocks.0.{evil}", "blocks.1.fc"], steps=2)
    result.metadata = {"model": evil, evil: evil, "nested": {evil: [evil]}}
    result.method = dict.fromkeys(result.method, evil)
    result.uncalled = [evil]
    result.seconds[evil] = 0.1
    report.write_html(result, tmp_path / "a.html")
    source = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<script" not in source
    assert Page(source).text.count("<script>alert('x')</script>&\"") >= 5
    page = Page(report.render_html(evil, [(evil, "<p>body</p>")]))
    assert page.text.count(evil) == 4  # title, h1, link, h2
    figure = plots.plot_cost(result)
    figure.set_label(evil)
    (image,) = Page(report.figure_to_html(figure)).named("img")
    assert image["alt"] == evil


def test_equal_figures_give_equal_html() -> None:
    first, second = (report.figure_to_html(plots.plot_ranks(SMALL)) for _ in range(2))
    assert first == second
    data = base64.b64decode(first.partition("base64,")[2].rstrip('">'))
    assert data.rstrip().endswith(b"</svg>")


def test_table_cells() -> None:
    rows = [[0.123456789, None, True, np.float32(2.5), "x"], [None, "a<b", False, 1, "y"]]
    table = report.table_to_html(["n", "text", "flag", "number", "<h>"], rows)
    assert re.findall(r"<td[^>]*>(.*?)</td>", table) == (
        ["0.1235", "–", "yes", "2.5", "x", "–", "a&lt;b", "no", "1", "y"]
    )
    assert re.findall(r"<th( class=\"n\")?>", table) == [' class="n"', "", "", ' class="n"', ""]
    assert "&lt;h&gt;" in table
    assert "<tbody>" in report.table_to_html(["a"], [])
    for row in (["one"], ["one", "two", "three"]):
        with pytest.raises(ValueError, match="2 headers"):
            report.table_to_html(["a", "b"], [row])


def test_report_without_matplotlib_has_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install eva-kernels\[report\]"):
        plots.save_result_plot(SMALL, tmp_path / "a.png")
    report.write_html(SMALL, tmp_path / "a.html")
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert page.text.count("No figure: plots need matplotlib") == 4
    assert page.named("img") == []
