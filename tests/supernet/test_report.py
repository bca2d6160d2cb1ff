"""The report of synthetic run folders, as text and in a real browser."""

import itertools
import json
import math
import os
import random
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
import yaml

from latency.table import Calibration, LatencyTable, Measurement, OpKey, Target
from supernet.report import comparison_table, write_comparison, write_report
from supernet.report.diagram import draw
from supernet.report.page import number
from supernet.space import Diagram
from supernet.spaces.darts import Darts
from supernet.spaces.mbconv import MBConv
from supernet.spaces.nasbench201 import NasBench201
from supernet.tracking import read_journal

SECTIONS = (
    "summary", "architecture", "probabilities", "cost", "accuracy", "latency", "time", "config",
)  # fmt: skip
HOSTILE = '<script>alert(1)</script> & $x^2$ "quoted"'
CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_result(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def measured(median):
    return {"median_ms": median, "iqr_ms": 0.03 * median, "num_runs": 50}


def epochs_of(space, architecture, num_epochs, warmup, budget):
    """Epoch lines of a search that turns towards `architecture`."""
    draw = random.Random(0)
    start = {c.name: [draw.gauss(0, 0.3) for _ in c.options] for c in space.choices}
    pace = {c.name: draw.uniform(1.5, 5) for c in space.choices}
    for epoch in range(num_epochs):
        share = max(0.0, (epoch - warmup + 1) / (num_epochs - warmup))
        record = {
            "step": 10 * (epoch + 1), "epoch": epoch,
            "phase": "warmup" if epoch < warmup else "search",
            "train_loss": 2.3 * math.exp(-epoch / 20),
            "train_accuracy": 90 * (1 - math.exp(-epoch / 12)) + 10,
            "learning_rate": 0.05,
        }  # fmt: skip
        if epoch >= warmup:
            probabilities = {}
            for choice in space.choices:
                logits = list(start[choice.name])
                logits[choice.index(architecture[choice.name])] += pace[choice.name] * share
                exps = [math.exp(logit) for logit in logits]
                probabilities[choice.name] = [value / sum(exps) for value in exps]
            record |= {
                "arch_loss": 2.0,
                "arch_accuracy": 80 * (1 - math.exp(-epoch / 12)) + 10,
                "expected_cost": budget * (1 + 0.6 * math.exp(-6 * share)),
                "argmax_cost": budget * (0.97 + 0.5 * math.exp(-4 * share)),
                "multiplier": 3 * share * math.exp(-share),
                "entropy": 1 - 0.8 * share,
                "skip_share": 0.3 * share,
                "probabilities": probabilities,
                "architecture": dict(architecture),
            }
        yield record


def ranks_of(space, generator):
    for candidate in range(40):
        cost = generator.uniform(2.0, 3.2)
        yield {
            "step": 300, "epoch": 29, "phase": "rank", "candidate": candidate,
            "accuracy": 50 + 8 * cost + generator.gauss(0, 2), "cost": cost,
            "architecture": {
                c.name: c.options[candidate % len(c.options)] for c in space.choices
            },
        }  # fmt: skip


def make_run(folder, space, *, retrain, one_shot=False, num_epochs=30):
    """A run folder as a search and a retraining leave it."""
    folder.mkdir(parents=True)
    generator = random.Random(1)
    options = {c.name: c.options[i % len(c.options)] for i, c in enumerate(space.choices)}
    architecture = space.architecture(options)
    architecture.save(folder / "architecture.json")
    lines = list(epochs_of(space, architecture, num_epochs, 6, 3.2))
    if one_shot:
        lines = [{**line, "phase": "warmup", "probabilities": None, "expected_cost": None,
                  "entropy": None} for line in lines]  # fmt: skip
        lines += ranks_of(space, generator)
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "timing.jsonl", (
        {"step": 10 * (e + 1), "epoch": e, "seconds": 9.5, "steps_per_second": 20 + e % 3,
         "wait_share": 0.01 + 0.002 * (e % 5)} for e in range(num_epochs)
    ))  # fmt: skip
    write_result(folder / "result.json", {
        "cost": {"name": "latency", "unit": "ms"}, "budget": 3.2, "reachable": [1.1, 6.4],
        "predicted": 3.15, "predicted_ms": 3.15, "measured_ms": measured(3.24), "accuracy": 71.3,
        "architecture": options, "seconds": {"search": 285.0, "measure": 20.0},
        "objective": 28.7, "uncalibrated_ms": 2.8, "binding": True, "attempts": [],
    })  # fmt: skip
    key = OpKey("conv", 3, 8, 1, 32)
    target = Target(resolution=space.img_size)
    figures = {"num_networks": 2, "mape": 1.5, "worst": 2.25, "noise": 0.5}
    points = [[2.0, 2.03], [3.0, 2.94]]
    calibration = Calibration(
        space.id, space.settings, 0.1, 1.05, 0.2, 8, {**figures, "points": points}, []
    )
    LatencyTable(
        target, {"device_name": "a processor"}, 0.01, 0.2,
        {key: Measurement(0.5, 0.01, 0.01, 9)}, [calibration],
    ).save(folder / "latency_table.json")  # fmt: skip
    config = {"seed": 1, "space": {"note": HOSTILE}, "objective": {"budget_ms": 3.2}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if retrain:
        make_retraining(folder / "retrain", options, generator, num_epochs)
    return folder


def make_retraining(folder, options, generator, num_epochs):
    networks = []
    for name in ("derived", "random_0", "random_1", "random_2"):
        top = 84.0 if name == "derived" else 82 + generator.random()
        predicted = generator.uniform(2.9, 3.2)
        networks.append({
            "name": name, "accuracy": top, "val_accuracy": top + 0.4, "best_epoch": num_epochs - 2,
            "predicted_ms": predicted, "measured_ms": measured(predicted * 1.04),
            "params": 1_234_567, "macs": 45_600_000, "architecture": options,
        })  # fmt: skip
        write_lines(folder / name / "metrics.jsonl", (
            {"step": 10 * e, "epoch": e, "phase": "retrain", "train_loss": 1.0,
             "train_accuracy": 50.0, "val_accuracy": top * (1 - math.exp(-(e + 1) / 6)),
             "ema_val_accuracy": None, "learning_rate": 0.1} for e in range(num_epochs)
        ))  # fmt: skip
    result = {"networks": networks, "budget": 3.2, "seconds": 400.0}
    write_result(folder / "result.json", result)


PAPER = MBConv(img_size=32, stem_stride=1)  # 21 choices
SMALL = MBConv(
    in_chans=1, img_size=8, stem_chs=8, stem_stride=1, first_chs=8, stages=((8, 2, 1), (16, 2, 2)),
    kernels=(3, 5), expansions=(2, 4), head_chs=32,
)  # fmt: skip
CELL = NasBench201(widths=(4, 8), num_cells=1)
TWO_CELLS = Darts(width=4, num_cells=3)

RUNS = {
    "mbconv": dict(space=PAPER, retrain=True),
    "cell": dict(space=CELL, retrain=False),
    "one_shot": dict(space=CELL, retrain=False, one_shot=True),
}
# sections that only say why they are empty
SAID = {"one_shot": {"cost"}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_run(folder / name, **given) for name, given in RUNS.items()}


@pytest.fixture(scope="module")
def reports(runs):
    return {name: write_report(run) for name, run in runs.items()}


class Elements(HTMLParser):
    """Tags with attributes, in order."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("name", RUNS)
def test_report_is_one_file_that_loads_nothing(runs, reports, name):
    assert reports[name] == runs[name] / "report.html"
    elements = Elements(reports[name].read_text()).found
    for tag, attributes in elements:
        assert tag not in ("script", "iframe", "object", "base"), attributes
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:")), (tag, attributes)
        assert not any(key.startswith("on") for key in attributes), (tag, attributes)
        assert not re.search(r"url\((?!#)", attributes.get("style") or ""), attributes
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [a["id"] for tag, a in elements if tag == "section"] == list(SECTIONS)


def test_what_users_wrote_is_escaped(reports):
    text = reports["mbconv"].read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_report_is_the_same_every_time(runs, reports):
    before = reports["cell"].read_bytes()
    assert write_report(runs["cell"]).read_bytes() == before


def test_every_limit_has_a_card_and_a_word_in_the_verdict(runs, tmp_path):
    folder = tmp_path / "limited"
    shutil.copytree(runs["cell"], folder)
    result = json.loads((folder / "result.json").read_text())
    limits = {
        "macs": {"unit": "MACs", "limit": 3e8, "expected": 3.2e8, "derived": 2.4e8,
                 "multiplier": 0.25},
        "peak_memory": {"unit": "bytes", "limit": 2000, "expected": None, "derived": 1500,
                        "multiplier": None},
    }  # fmt: skip
    write_result(folder / "result.json", {**result, "limits": limits})
    text = write_report(folder).read_text()
    assert "within its limit of macs and peak_memory; measured whole" in text
    assert re.search(r"<dt>Predicted macs</dt><dd>240.M <small>MACs</small></dd>", text)
    assert "80.0% of the limit of 300\u202fM MACs, multiplier 0.250" in text
    assert re.search(r"<dt>Predicted peak memory</dt><dd>1500 <small>bytes</small></dd>", text)
    assert "75.0% of the limit of 2000 bytes</dd>" in text
    limits["macs"]["derived"] = 4e8
    write_result(folder / "result.json", {**result, "limits": limits})
    text = write_report(folder).read_text()
    assert ", above its limit of macs;" in text and 'class="verdict bad"' in text


def test_sections_say_what_is_missing(runs, reports, tmp_path):
    text = reports["cell"].read_text()
    assert f"This run did not retrain: run supernet-retrain run={runs['cell']}." in text
    assert "no logits, and so no expected latency" in reports["one_shot"].read_text()
    folder = tmp_path / "young"
    first = {"step": 1, "epoch": 0, "phase": "warmup", "train_accuracy": 30.0}
    write_lines(folder / "metrics.jsonl", [first])
    text = write_report(folder).read_text()
    assert "has not derived an architecture" in text
    assert "no config.yaml" in text
    assert text.count("<figure") == 1  # the accuracy so far


def test_a_search_that_tried_architectures_shows_the_best_so_far(runs, tmp_path):
    """It had no epochs; a surrogate's correlations stand beside it."""
    path = shutil.copytree(runs["one_shot"], tmp_path / "run")
    lines = [r for r in read_journal(path / "metrics.jsonl") if r["phase"] == "rank"]
    records = [
        {**r, "step": n, "judge": "a test", "oracle": False, "unit": "%", "rank_value": -n}
        for n, r in enumerate(lines, 1)
    ]
    note = {"phase": "surrogate", "num_blocks": 2, "judged": 8, "rank_correlation": 0.456}
    write_lines(path / "metrics.jsonl", [*records, {**note, "step": 8, "epoch": 0}])
    write_lines(path / "timing.jsonl", [{"step": r["step"], "seconds": 2.0} for r in records])
    text = write_report(path).read_text()
    assert "The best so far, by evaluations and by seconds" in text
    assert "what was then found: 0.46 for 8 of 2 blocks." in text
    assert text.count("This search had no epochs") >= 1 and "No epoch has ended yet" not in text


def test_retraining_folder_of_its_own(tmp_path):
    folder = tmp_path / "again"
    make_retraining(folder, {}, random.Random(0), 3)
    text = write_report(folder).read_text()
    assert "mean of random (n = 3)" in text


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no run folder"):
        write_report(tmp_path)


def test_mean_of_random_is_labelled_and_right(runs, reports):
    networks = json.loads((runs["mbconv"] / "retrain" / "result.json").read_text())["networks"]
    accuracies = [n["accuracy"] for n in networks if n["name"] != "derived"]
    row = re.search(r"mean of random \(n = 3\)</td><td>([\d.]+)<", reports["mbconv"].read_text())
    assert float(row[1]) == pytest.approx(sum(accuracies) / 3, abs=0.005)


@pytest.mark.parametrize(
    "value, text",
    [(None, "–"), (0, "0"), (0.01234, "0.0123"), (4.256, "4.26"), (42.56, "42.6"), (425.6, "426"),
     (4256, "4256"), (42560, "42.6\u202fk"), (4.2e6, "4.20\u202fM"), (45.6e6, "45.6\u202fM"),
     (456e6, "456\u202fM"), (1.5e9, "1.50\u202fG")],
)  # fmt: skip
def test_number(value, text):
    assert number(value) == text


# ---- drawings ----


class Graph(NasBench201):
    """A space whose diagram is a given graph."""

    def __init__(self, edges):
        super().__init__()
        self.graph = Diagram(tuple("abcdefgh"), tuple(edges))

    def diagram(self, architecture):
        return self.graph


def some(space):
    return space.sample(torch.Generator().manual_seed(0))


def rectangles(drawing):
    for box in drawing.boxes:
        yield box.x, box.y, box.x + box.width, box.y + box.height
    for arc in drawing.arcs:
        if arc.text:
            yield arc.x - arc.width / 2, arc.y - 9, arc.x + arc.width / 2, arc.y + 9


EVERY_PAIR = [(s, t, f"operation {s}{t}") for s, t in itertools.combinations(range(8), 2)]


@pytest.mark.parametrize(
    "space",
    [
        CELL,
        TWO_CELLS,
        Graph(EVERY_PAIR),
        Graph([(3, 1, "backwards"), (1, 0, ""), *EVERY_PAIR[12:]]),
    ],
)
def test_graph_has_no_overlaps_and_stays_inside(space):
    drawing = draw(space, some(space))
    assert len(drawing.arcs) == len(space.diagram(some(space)).edges)
    placed = list(rectangles(drawing))
    for x1, y1, x2, y2 in placed:
        assert x1 >= 0 and y1 >= 0 and x2 <= drawing.width and y2 <= drawing.height
    for a, b in itertools.combinations(placed, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)


def test_chain_colours_what_can_be_chosen():
    architecture = SMALL.architecture(
        {"stage1_0": "k3_e2", "stage1_1": "zero", "stage2_0": "k5_e4", "stage2_1": "k3_e2"}
    )
    chain = draw(SMALL, architecture).chain
    assert [item.label for item in chain] == [
        "image", "stem", "k3 e1", "k3 e2", "skip", "k5 e4", "k3 e2", "head",
    ]  # fmt: skip
    kinds = [item.kind for item in chain]
    assert kinds[:3] == ["fixed"] * 3 and kinds[-1] == "fixed"
    assert kinds[4] == "skip"
    assert kinds[3] == kinds[6] != kinds[5]
    assert chain[5].detail == "16 /2"


def test_collapse_is_shown(tmp_path):
    run = make_run(tmp_path / "run", CELL, retrain=False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["curvature"] = 0.1 * line["epoch"]
        line["expected_cost"] = 100.0 + line["epoch"]
    lines.append({
        "step": 300, "epoch": 30, "phase": "monitor", "action": "rollback", "good_epoch": 24,
        "why": "100% of the derived architecture's choices compute nothing", "rule": "skip",
    })  # fmt: skip
    write_lines(run / "metrics.jsonl", lines)
    text = write_report(run).read_text()
    assert "Largest eigenvalue of the Hessian" in text and "largest eigenvalue" in text
    assert "After epoch 30 the monitor went back to epoch 24: 100% of the derived" in text
    assert "at the end 124 and" in text


# ---- comparison ----


def make_sweep(folder):
    for index, (op, seed) in enumerate(itertools.product(("one_shot", "softmax"), (1, 2))):
        job = folder / str(index)
        write_lines(job / ".hydra" / "overrides.yaml", [])
        overrides = [f"mixed_op={op}", f"seed={seed}", "+experiment=quick"]
        (job / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
        if index == 3:
            continue  # failed
        write_result(job / "result.json", {
            "cost": {"name": "latency", "unit": "ms"}, "budget": 3.0, "predicted": 2.5 + index / 10,
            "predicted_ms": 2.5, "measured_ms": measured(2.6) if index else None,
            "accuracy": 70.0 + index, "seconds": {"search": 10.0, "measure": 2.5},
            "objective": 30.0 - index,
        })  # fmt: skip
    (folder / "0" / "retrain").mkdir()
    make_retraining(folder / "1" / "retrain", {}, random.Random(0), 2)
    return folder


def test_comparison_table(tmp_path):
    table = comparison_table(sorted(make_sweep(tmp_path / "sweep").iterdir()))
    assert [row["overrides"] for row in table] == [
        {"mixed_op": "one_shot", "seed": "1"}, {"mixed_op": "one_shot", "seed": "2"},
        {"mixed_op": "softmax", "seed": "1"}, {"mixed_op": "softmax", "seed": "2"},
    ]  # fmt: skip
    assert [row["status"] for row in table] == ["done", "done", "done", "failed"]
    assert [row["accuracy"] for row in table] == [70.0, 71.0, 72.0, None]
    assert [row["measured_ms"] for row in table] == [None, 2.6, 2.6, None]
    assert [row["test_accuracy"] for row in table] == [None, 84.0, None, None]
    assert table[0]["seconds"] == 12.5


def test_write_comparison(tmp_path):
    sweep = make_sweep(tmp_path / "sweep")
    text = write_comparison(sweep)
    assert text + "\n" == (sweep / "comparison.txt").read_text()
    assert json.loads((sweep / "comparison.json").read_text())[3]["status"] == "failed"
    lines = text.splitlines()
    assert lines[6] == "" and "experiment" not in text
    assert lines[2].split()[:3] == ["0", "one_shot", "1"]
    assert "failed: it left no result" in lines[5]
    assert "softmax" in (sweep / "comparison.html").read_text()


def test_jobs_that_differ_in_the_seed_alone_are_taken_together(tmp_path):
    sweep = make_sweep(tmp_path / "sweep")
    lines = write_comparison(sweep).splitlines()[7:]
    assert lines[0].split()[:2] == ["mixed_op", "n"]
    assert lines[2].split()[:5] == ["one_shot", "2", "29.50", "±", "0.71"]
    assert lines[3].split()[:4] == ["softmax", "1", "(1", "failed)"] and "28.00" in lines[3]
    first, second = json.loads((sweep / "comparison_over_seeds.json").read_text())
    assert first["overrides"] == {"mixed_op": "one_shot"}
    assert (first["n"], first["failed"]) == (2, 0)
    assert first["accuracy"] == {"mean": 70.5, "std": pytest.approx(0.5**0.5)}
    assert first["seconds"] == {"mean": 12.5, "std": 0.0}
    assert first["test_accuracy"] == {"mean": None, "std": None}  # one of two retrained
    assert (second["n"], second["failed"]) == (1, 1)
    assert second["objective"] == {"mean": 28.0, "std": None}
    assert "Over seeds" in (sweep / "comparison.html").read_text()


def test_random_searches_stand_beside_their_jobs(tmp_path):
    figures = {"search": (30.0, 93.0, 95.0), "random": (20.0, 91.0, 94.0)}
    for seed in range(3):
        job = tmp_path / str(seed)
        write_lines(job / ".hydra" / "overrides.yaml", [])
        (job / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([f"seed={seed}"]))
        networks = []
        for strategy, (objective, benchmark, test) in figures.items():
            folder = job if strategy == "search" else job / "random_search"
            folder.mkdir(exist_ok=True)
            write_result(folder / "result.json", {
                "cost": {"name": "params", "unit": ""}, "objective": objective + seed,
                "accuracy": 100 - objective - seed, "seconds": {"search": 60.0},
                "benchmark": {"accuracy": benchmark + 2 * seed},
            })  # fmt: skip
            name = "derived" if strategy == "search" else "best_at_random"
            networks.append({"name": name, "accuracy": test + seed})
        (job / "retrain").mkdir()
        write_result(job / "retrain" / "result.json", {"networks": networks})
    table = comparison_table(sorted(p for p in tmp_path.iterdir() if p.is_dir()))
    names = [f"{seed}{own}" for seed in range(3) for own in ("", "/random_search")]
    assert [row["job"] for row in table] == names
    assert [row["overrides"]["strategy"] for row in table] == ["search", "random"] * 3
    assert [row["test_accuracy"] for row in table] == [95.0, 94.0, 96.0, 95.0, 97.0, 96.0]
    lines = write_comparison(tmp_path).splitlines()
    assert lines[-2].split()[:2] == ["search", "3"] and lines[-1].split()[:2] == ["random", "3"]
    assert "31.00 ± 1.00" in lines[-2] and "95.00 ± 2.00" in lines[-2]
    assert "21.00 ± 1.00" in lines[-1] and "93.00 ± 2.00" in lines[-1]


def test_a_sweep_with_more_than_ten_jobs_is_in_order(tmp_path):
    for index in range(12):
        write_lines(tmp_path / str(index) / ".hydra" / "overrides.yaml", [])
    rows = [line.split()[0] for line in write_comparison(tmp_path).splitlines()[2:]]
    assert rows == [str(index) for index in range(12)]


def test_folder_without_jobs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no jobs"):
        write_comparison(tmp_path)


# ---- a real browser ----


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    selenium = pytest.importorskip("selenium.webdriver")
    if not (os.path.exists(CHROMIUM) and os.path.exists(DRIVER)):
        pytest.skip("needs chromium and chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
        "window-size=1100,1400", f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


def requests(browser):
    """Addresses that the page asked for since the last call."""
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            if not url.startswith("chrome:"):  # the browser's own empty tab
                yield url


@pytest.mark.parametrize("name", RUNS)
def test_report_in_a_browser(browser, reports, name):
    list(requests(browser))
    browser.get(reports[name].as_uri())
    assert browser.get_log("browser") == []
    asked = list(requests(browser))
    assert asked and all(url.startswith(("file:", "data:")) for url in asked), asked
    sections = browser.find_elements("css selector", "section")
    assert [section.get_attribute("id") for section in sections] == list(SECTIONS)
    for section in sections:
        drawn = section.find_elements("css selector", "svg, .chain, table, details")
        if section.get_attribute("id") in SAID.get(name, ()):
            assert not drawn and len(section.find_element("class name", "missing").text) > 20
            continue
        if section.get_attribute("id") == "summary":
            drawn += section.find_elements("css selector", ".cards > div")
        assert drawn, section.get_attribute("id")
        for element in drawn:
            assert element.size["width"] > 50 and element.size["height"] > 15
    images = browser.execute_script(
        "return [...document.querySelectorAll('svg image')].map(i => i.getBoundingClientRect())"
    )
    choices = len(RUNS[name]["space"].choices)
    assert len(images) == (0 if RUNS[name].get("one_shot") else choices + 1)  # and the scale
    assert all(image["width"] > 50 and image["height"] > 8 for image in images)
    # nothing sticks out of the page
    assert browser.execute_script(
        "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )


@pytest.mark.parametrize("name", RUNS)
def test_texts_in_figures_do_not_overlap(browser, reports, name):
    browser.get(reports[name].as_uri())
    clashes = browser.execute_script("""
        const clashes = [];
        for (const svg of document.querySelectorAll("svg")) {
            const texts = [...svg.querySelectorAll("text")].map(
                t => [t.textContent, t.getBoundingClientRect()]);
            for (const [i, [a, p]] of texts.entries())
                for (const [b, q] of texts.slice(i + 1))
                    if (Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 &&
                        Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 3)
                        clashes.push([a, b]);
        }
        return clashes;""")
    assert clashes == []


def test_comparison_in_a_browser(browser, tmp_path):
    write_comparison(make_sweep(tmp_path / "sweep"))
    browser.get((tmp_path / "sweep" / "comparison.html").as_uri())
    assert browser.get_log("browser") == []
    rows = browser.find_elements("css selector", "#comparison tbody tr")
    assert [row.text.split()[1] for row in rows] == ["one_shot", "one_shot", "softmax", "softmax"]
    assert len(browser.find_elements("css selector", "#seeds tbody tr")) == 2
