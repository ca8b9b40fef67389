"""Names that are scripts: whatever a trace, a folder or a setting is called, a page holds no markup of theirs."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from made_traces import MadeTrace, record, two_steps
from run_folders import make_pair

from quadriga.cli.main import main

EVIL = {
    "a script": "<script>alert(1)</script>",
    "an end of a script": "</script><script>alert(1)</script>",
    "an end of a style": "</style><script>alert(1)</script>",
    "an end of a title": "</title></text></svg><script>alert(1)</script>",
    "an attribute": '"><img src=x onerror=alert(1)>',
    "a single quote": "'><svg onload=alert(1)>",
    "a section": "]]><script>alert(1)</script>",
    "a comment": "--><script>alert(1)</script><!--",
    "an address": "javascript:alert(1)",
    "an address in an element": '<a href="javascript:alert(1)">x</a>',
    "an entity": "&lt;script&gt;alert(1)&#x3c;/script&#x3e;",
    "control characters": "\x1b]0;a\x07<b onclick=alert(1)>\x00\u202e\ud800",
}
ELEMENTS = {
    *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "div", "section", "span", "strong"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td", "ul", "li", "figure", "figcaption", "details", "summary"),
    *("svg", "g", "rect", "line", "path", "circle", "text"),
}
ATTRIBUTES = {
    *("charset", "name", "content", "http-equiv", "lang", "class", "role", "scope", "title", "aria-label"),
    *("aria-hidden", "viewbox", "width", "height", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "d", "transform"),
    *("text-anchor", "stroke-dasharray", "rx", "style"),
}
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.comments: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def is_ours(text: str) -> None:
    """Every element and attribute is one that our pages have, and nothing could run or be fetched."""
    seen = Seen()
    seen.feed(text)
    seen.close()
    assert {tag for tag, _ in seen.elements} <= ELEMENTS
    assert {name for _, attributes in seen.elements for name in attributes} <= ATTRIBUTES
    assert not seen.comments
    styles = {each["style"] for _, each in seen.elements if "style" in each}
    assert all(re.fullmatch(r"[a-z0-9:;#-]+", style or "") for style in styles), styles
    assert [each["content"] for tag, each in seen.elements if tag == "meta" and "http-equiv" in each] == [POLICY]
    styles = [place for place, (tag, _) in enumerate(seen.elements) if tag == "style"]
    assert len(styles) == 1
    assert "\x1b" not in text


@pytest.mark.parametrize("name", EVIL.values(), ids=EVIL)
def test_the_page_of_a_trace(tmp_path, name):
    for rank in range(2):
        trace = two_steps(
            rank, {"all_gather": f"nccl {name} AllGather", "reduce_scatter": "ncclDevKernel_ReduceScatter"}
        )
        about = record(f"allreduce {name}", 500, 500, "Float", group=name, purpose=f"mesh_{name}")
        trace.host("record_param_comms", 700, 710, **about)
        trace.launch(705, 77)
        trace.device(name, 910, 950, 77)
        trace.mark(f"FSDP::pre_forward ({name})", 800, 804)
        trace.host(f"aten::{name}", 804, 808)
        trace.launch(806, 78)
        trace.device(f"gemm {name}", 950, 990, 78)
        trace.mark(f"FSDP::post_forward ({name})", 990, 994)
        trace.about["host_name"] = trace.about["distributedInfo"]["backend"] = name
        folder = tmp_path / name.replace("/", "_").replace("\0", "0").encode(errors="ignore").decode()
        trace.write(folder / f"rank{rank}_trace.json")
        call = {"axis": name, "collective": name, "calls": 1, "bytes": 1}
        (folder / "estimate.json").write_text(json.dumps({"communication": [call]}))
    assert main(["trace", str(folder), "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    is_ours(text)
    assert "alert(1)" in text, "the names are in it, as text"


@pytest.mark.parametrize("name", EVIL.values(), ids=EVIL)
def test_the_page_of_a_comparison(tmp_path, name):
    make_pair(tmp_path, [0.1, 0.11, 0.1], [0.2, 0.21, 0.2])
    names = [f"mode={name}", f"other={name}"]
    settings = [{"folder": folder, "name": each} for folder, each in zip("ab", names, strict=True)]
    (tmp_path / "bench.json").write_text(json.dumps({"settings": settings, "varied": {f"job.{name}": names}}))
    for run in sorted(tmp_path.glob("*/repeat-*")):
        environment = json.loads((run / "environment.json").read_text())
        label = f"{name} {run.parent.name}"
        environment |= {"host": label, f"key {name}": label, "backend": name}
        (run / "environment.json").write_text(json.dumps(environment))
        lines = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(
            lines + json.dumps({"step": 99, "attempt": 1, "kind": 5, "loss": name}) + "\n"
        )
        trace = MadeTrace(0, 1)
        trace.mark("ProfilerStep#0", 0, 100)
        trace.host("record_param_comms", 10, 20, **record("allreduce", 5, 5, "Float", purpose=name))
        trace.launch(15, 3)
        trace.device(name, 30, 60, 3)
        trace.write(run / "profile_trace/iteration_20/rank0_trace.json")
    assert main(["compare", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    is_ours(text)
    assert "alert(1)" in text, "the names are in it, as text"
