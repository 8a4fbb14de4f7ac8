from benchmarks.report import Column, Report, grouped_bars, machine, versions


def test_report_is_complete_and_repeatable(tmp_path):
    def written(folder):
        report = Report(
            name="table",
            title="A table",
            settings={"dtype": "bfloat16", "machine": {"threads": 2}},
            columns=[Column("method", "method"), Column("speed", "t/s", "{:.1f}"), Column("ratio", "×")],
            notes=["tokens/s counts delivered tokens"],
            rows=[{"method": "none", "speed": 1.25, "more": 3}, {"method": "loop", "speed": 1.0, "ratio": 2}],
        )
        return report.write(
            folder,
            lambda axes, rows: grouped_bars(
                axes, {"all": {r["method"]: r["speed"] for r in rows}}, "tokens/s"
            ),
        )

    first, second = written(tmp_path / "a"), written(tmp_path / "b")
    assert [path.name for path in first] == ["table.json", "table.md", "table.png"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    text = first[1].read_text()
    assert "| none | 1.2 | – |" in text
    assert "machine.threads: 2" in text and "- tokens/s counts delivered tokens" in text
    assert '"more": 3' in first[0].read_text()  # JSON has what the table leaves out


def test_machine_and_versions_name_what_decides_speed():
    found = machine(threads=2)
    assert found["cpu"] and found["cores"] >= 1 and found["threads"] == 2
    assert {"python", "torch", "vllm_dlm"} <= set(versions())
