from __future__ import annotations

import copy

from rich.console import Console

from sparingly.report import conversion, html, result, terminal

RAW = {
    "schema": 1,
    "machine": {},
    "versions": {},
    "workloads": {
        "smollm": {
            "title": "A converted network",
            "quality": {
                "metric": "perplexity",
                "n": 80,
                "dense": {"value": 20.0},
                "selective": {"value": 20.1},
                "drop": {"value": 0.005, "lo": 0.003, "hi": 0.007},
                "prose": {
                    "dense": {"value": 30.0},
                    "selective": {"value": 30.3},
                    "drop": {"value": 0.01, "lo": 0.008, "hi": 0.012},
                },
            },
            "agreement": {"value": 0.95, "lo": 0.94, "hi": 0.96},
            "continuations": {"n": 4, "identical": {"value": 0.5, "lo": 0.2, "hi": 0.8}, "mean_common_tokens": 20.0},
            "contract": {
                "metric": "perplexity",
                "max_drop": 0.01,
                "confidence": 0.95,
                "n": 96,
                "bound": "clipped betting",
                "clip": 10.0,
                "clipped": 2,
                "drop": 0.006,
                "upper": 0.009,
                "setting": {"a": 60},
            },
            "inference": {
                "decode": {
                    "saving": {"cpu_s": {"value": 1.4, "lo": 1.3, "hi": 1.5}, "macs": 1.7, "bytes": 1.6},
                    "saving_bf16": {"cpu_s": {"value": 1.1, "lo": 0.9, "hi": 1.2}, "bytes": 1.6},
                }
            },
            "head": {
                "engine": "pytorch (fp32)",
                "rows": [
                    {
                        "rank": 128,
                        "keep": 256,
                        "agreement": {"value": 0.994, "lo": 0.992, "hi": 0.996},
                        "cpu_s": {"value": 25.0, "lo": 23.0, "hi": 27.0},
                    }
                ],
            },
            "recovered": {
                "contract": {"upper": 0.0095},
                "training_cpu_s": 1740.0,
                "tokens": 170000,
                "quality": {"drop": {"value": 0.007, "lo": 0.004, "hi": 0.01}},
                "saving": {"macs": 1.41, "bytes": 1.78},
            },
            "controls": {"share": 0.6, "drop": {"Random": {"value": 0.9, "lo": 0.8, "hi": 1.0}}},
            "layers": [
                {"name": "layers.0.mlp", "selector": "Threshold", "share_run": 0.6},
                {"name": "layers.1.mlp", "selector": "Threshold", "share_run": 0.8},
            ],
        }
    },
}


def workload(**changed) -> result.Workload:
    raw = copy.deepcopy(RAW)
    raw["workloads"]["smollm"] |= changed
    return result.parse(raw).workloads[0]


def test_the_headline_is_the_smallest_ruler_of_all_precisions():
    assert conversion.is_conversion(workload())
    assert conversion.headline(workload()).startswith("1.1× is the smallest saving (bf16, processor time)")
    assert "0.6 % lost, at most 0.9 %" in conversion.contract(workload())
    assert "2 counted as 10 times" in conversion.contract(workload())


def test_what_int8_rows_lose_stands_beside_their_saving():
    assert not any("int8" in row[0] for row in conversion.summary(workload())[0].rows)
    pair = {
        "n": 16,
        "dense": {"value": 20.0},
        "selective": {"value": 20.4},
        "drop": {"value": 0.02, "lo": 0, "hi": 0.1},
    }
    decode = {"saving_int8": {"cpu_s": {"value": 1.2, "lo": 1.1, "hi": 1.3}}, "quality_int8": pair}
    quality, saved, *_ = conversion.summary(workload(inference={"decode": decode}))
    assert ("16 of them, int8 rows", "20", "20.4") in [row[:3] for row in quality.rows]
    assert [row[0] for row in saved.rows] == ["int8"]


def test_a_contract_that_nothing_kept_is_said():
    made = workload(contract=RAW["workloads"]["smollm"]["contract"] | {"setting": None, "drop": None, "upper": None})
    assert "stays dense" in conversion.headline(made)
    assert "nothing passed on 96 examples" in conversion.contract(made)


def test_losses_are_published():
    assert conversion.losses(workload()) == ["bf16: processor time 1.1×, not shown to be a saving"]
    quality = copy.deepcopy(RAW["workloads"]["smollm"]["quality"])
    quality["drop"] = {"value": 0.02, "lo": 0.015, "hi": 0.025}
    assert any("more than the contract's" in item for item in conversion.losses(workload(quality=quality)))


def test_tables_hold_what_was_measured_and_leave_out_what_was_not():
    captions = [table.caption for table in conversion.tables(workload())]
    assert len(captions) == 6 and any("29 processor-minutes, 170,000 tokens" in caption for caption in captions)
    layers = conversion.tables(workload())[-1]
    assert layers.rows == (("mlp", "Threshold", "2", "70.0 %", "60.0 %"),)
    assert len(conversion.tables(workload(head=None, controls=None, layers=None, recovered=None))) == 2
    assert len(conversion.summary(workload())) == 4


def test_both_views_show_every_cell():
    console = Console(width=120, record=True, force_terminal=False)
    report = result.parse(RAW)
    terminal.show(report, console)
    text, page = console.export_text(), html.page(report)
    for table in conversion.tables(report.workloads[0]):
        for row in table.rows:
            for cell in row:
                assert cell in page
                assert cell in text
    assert "not shown to be a saving" in text and "not shown to be a saving" in page
