"""Loaders of trace files, and discovery of workloads by name. Broken files give one error that names the place."""

from __future__ import annotations

import json
import os
import shutil
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from schedlab.envs.core.errors import InputError
from schedlab.envs.request_scheduling import traces
from schedlab.envs.request_scheduling.generate import PERCENTILES, PUBLISHED
from schedlab.envs.request_scheduling.traces import (
    MAX_LINE_BYTES,
    TRACES,
    WORKLOADS,
    find_trace_file,
    find_workload,
    load_azure,
    load_mooncake,
    load_sharegpt,
    load_trace,
    load_vllm_measured,
    load_vllm_requests,
)
from schedlab.envs.request_scheduling.workload import DEFAULT_RANK_CORRELATION, spearman

AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:04.0781490,110,27
"""

MOONCAKE = [
    {"timestamp": 100, "input_length": 1100, "output_length": 6, "hash_ids": [7, 3, 9]},
    {"timestamp": 100, "input_length": 1024, "output_length": 4, "hash_ids": [7, 50]},
    {"timestamp": 2600, "input_length": 500, "output_length": 1, "hash_ids": [51]},
]

SHAREGPT = [
    {"input_toks": 5, "output_toks": 3, "arrival_time_ns": 46926808, "input_tok_ids": [1, 2, 3, 4, 5]},
    {"input_toks": 4, "output_toks": 2, "arrival_time_ns": 1046926808, "input_tok_ids": [1, 2, 3, 9]},
    {"input_toks": 1, "output_toks": 1, "arrival_time_ns": 1046926809, "input_tok_ids": [1]},
]

VLLM = [
    {
        "request_id": "a",
        "input_toks": 12,
        "output_toks": 5,
        "arrival_time": 1787267980.0,
        "queued_ts": 100.5,
        "scheduled_ts": 101.0,
        "first_token_ts": 102.5,
        "last_token_ts": 104.5,
    },
    {
        "request_id": "b",
        "input_toks": 7,
        "output_toks": 1,
        "arrival_time": 1787267981.0,
        "queued_ts": 101.75,
        "scheduled_ts": 101.75,
        "first_token_ts": 103.0,
        "last_token_ts": 103.0,
    },
]

JSON_ROWS = {"mooncake": MOONCAKE, "sharegpt": SHAREGPT, "vllm": VLLM}
LOADERS = {"azure": load_azure, "mooncake": load_mooncake, "sharegpt": load_sharegpt, "vllm": load_vllm_requests}


def json_lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


CONTENT = {"azure": AZURE} | {name: json_lines(rows) for name, rows in JSON_ROWS.items()}


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes, name: str = "requests.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real traces, or a skip."""
    named = os.environ.get("SCHEDLAB_DATA")
    root = next(p for p in Path(__file__).resolve().parents if (p / "pyproject.toml").exists())
    folder = Path(named) if named else root.parent / "shared" / "data"
    if not any((folder / sub / TRACES["azure_conv"].file).exists() for sub in ("", "request_traces")):
        pytest.skip(f"no traces in {folder}: name their folder in SCHEDLAB_DATA")
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No traces, no cache, no network."""
    monkeypatch.delenv("SCHEDLAB_DATA", raising=False)
    monkeypatch.setenv("SCHEDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SCHEDLAB_OFFLINE", "1")
    monkeypatch.setattr(traces, "_fetch_failures", {})


# --- Sound files -----------------------------------------------------------------------------------------------------


def test_azure_by_hand(write):
    w = load_azure(write(AZURE, "code.csv"))
    assert w.name == "code" and w.source.startswith(f"file {write(AZURE, 'code.csv')}; length predictor")
    assert w.arrival_s == pytest.approx([0.0, 0.052, 0.098189], abs=1e-12)
    assert w.prompt_tokens.tolist() == [4808, 3180, 110] and w.output_tokens.tolist() == [10, 8, 27]
    assert w.hash_block_tokens == 0


@pytest.mark.parametrize(
    "content",
    [
        AZURE.replace("\n", "\r\n"),
        AZURE.rstrip("\n"),
        "\ufeff" + AZURE,
        AZURE.replace("\n", "\n\n"),
        AZURE.replace(",", " , "),
        AZURE.replace("00,", "00+00:00,").replace("90,", "90Z,"),
        AZURE.replace("16 18", "16T18"),
        "\n".join(",".join(reversed(line.split(","))) for line in AZURE.splitlines()),
        "\n".join(f"{line},x" for line in AZURE.splitlines()),
    ],
    ids=[
        "crlf",
        "no last newline",
        "byte order mark",
        "blank lines",
        "spaces",
        "zone",
        "T",
        "reversed",
        "more columns",
    ],
)
def test_azure_variants(write, content):
    w = load_azure(write(content))
    assert w.arrival_s == pytest.approx([0.0, 0.052, 0.098189], abs=1e-12)
    assert w.output_tokens.tolist() == [10, 8, 27]


def test_mooncake_by_hand(write):
    w = load_mooncake(write(CONTENT["mooncake"]))
    assert w.arrival_s.tolist() == [0.0, 0.0, 2.5]
    assert w.hash_block_tokens == 512
    assert w.hash_offsets.tolist() == [0, 2, 4, 4]  # partial last blocks (9 and 51) are dropped
    assert w.hash_ids.tolist() == [0, 1, 0, 2]
    assert w.prefix_hit_share() == 512 / 2624


def test_sharegpt_by_hand(write):
    path = write(CONTENT["sharegpt"])
    w = load_sharegpt(path, hash_block_tokens=2)
    assert w.arrival_s.tolist() == [0.0, 1.0, 1.000000001]
    assert w.hash_block_tokens == 2 and w.hash_offsets.tolist() == [0, 2, 4, 4]
    assert w.hash_ids.tolist() == [0, 1, 0, 2]
    assert load_sharegpt(path, hash_block_tokens=0).hash_block_tokens == 0
    bare = [{key: row[key] for key in traces.SHAREGPT_KEYS} for row in SHAREGPT]
    assert load_sharegpt(write(json_lines(bare))).hash_block_tokens == 0


def test_equal_blocks_after_unlike_prefixes_are_unlike(write):
    rows = [
        {"input_toks": 4, "output_toks": 1, "arrival_time_ns": 0, "input_tok_ids": [1, 2, 8, 8]},
        {"input_toks": 4, "output_toks": 1, "arrival_time_ns": 0, "input_tok_ids": [3, 4, 8, 8]},
    ]
    assert load_sharegpt(write(json_lines(rows)), 2).hash_ids.tolist() == [0, 1, 2, 3]


def test_vllm_by_hand(write):
    path = write(CONTENT["vllm"])
    assert load_vllm_requests(path).arrival_s.tolist() == [0.0, 1.25]
    assert load_vllm_requests(path, arrivals="arrival_time").arrival_s.tolist() == [0.0, 1.0]
    with pytest.raises(InputError, match="arrivals is 'scheduled_ts'"):
        load_vllm_requests(path, arrivals="scheduled_ts")
    measured = load_vllm_measured(path)
    assert measured.ttft_s.tolist() == [2.0, 1.25]
    assert measured.tpot_s[0] == 0.5 and np.isnan(measured.tpot_s[1])
    assert measured.e2e_s.tolist() == [4.0, 1.25]
    assert measured.queue_s.tolist() == [0.5, 0.0]
    assert measured.handover_s.tolist() == [0.0, 0.25]


@pytest.mark.parametrize("form", LOADERS)
def test_formats_are_recognised(write, form):
    path = write(CONTENT[form])
    w = load_trace(path)
    assert np.array_equal(w.prompt_tokens, LOADERS[form](path).prompt_tokens)
    assert find_workload(path).source == find_workload(str(path)).source == w.source
    assert not w.has_true_lengths


# --- Broken files: each is one InputError with file, line and value --------------------------------------------------


def edited(form: str, row: int, **changes: object) -> str:
    """The sound file with values of one row changed; None drops the key."""
    rows = [dict(r) for r in JSON_ROWS[form]]
    rows[row] |= changes
    rows[row] = {key: value for key, value in rows[row].items() if value is not None}
    return json_lines(rows)


BROKEN = {  # format, content, line, what the message says
    "azure column missing": (
        "azure",
        AZURE.replace("Generated", "generated"),
        1,
        "column 'GeneratedTokens' is missing",
    ),
    "azure column doubled": ("azure", "TIMESTAMP,ContextTokens,ContextTokens,GeneratedTokens\n", 1, "doubled"),
    "azure no header": ("azure", AZURE.split("\n", 1)[1], 1, "column 'TIMESTAMP' is missing"),
    "azure header only": ("azure", AZURE.split("\n", 1)[0], 1, "holds a header but no request"),
    "azure cut line": ("azure", AZURE[:-30], 4, "1 values for 3 columns: '2023-"),
    "azure cell too many": ("azure", AZURE.replace(",8", ",8,1"), 3, "4 values for 3 columns"),
    "azure negative": ("azure", AZURE.replace("3180", "-3180"), 3, "ContextTokens is -3180"),
    "azure zero prompt": ("azure", AZURE.replace("3180", "0"), 3, "ContextTokens is 0"),
    "azure zero output": ("azure", AZURE.replace(",27", ",0"), 4, "GeneratedTokens is 0"),
    "azure decimal": ("azure", AZURE.replace(",27", ",27.0"), 4, "GeneratedTokens is '27.0'"),
    "azure nan": ("azure", AZURE.replace(",27", ",nan"), 4, "GeneratedTokens is 'nan'"),
    "azure empty cell": ("azure", AZURE.replace(",27", ","), 4, "GeneratedTokens is ''"),
    "azure underscore": ("azure", AZURE.replace(",27", ",2_7"), 4, "GeneratedTokens is '2_7'"),
    "azure other digits": ("azure", AZURE.replace(",27", ",٢٧"), 4, "GeneratedTokens is '٢٧'"),
    "azure too large": ("azure", AZURE.replace(",27", ",9999999999"), 4, "GeneratedTokens is 9999999999"),
    "azure far too large": ("azure", AZURE.replace(",27", "," + "9" * 5000), 4, "5002 characters"),
    "azure words": ("azure", AZURE.replace("3180", "many"), 3, "ContextTokens is 'many'"),
    "azure no time": ("azure", AZURE.replace("2023-11-16 18:17:04.0319600", "yesterday"), 3, "'yesterday', no time"),
    "azure nat": ("azure", AZURE.replace("2023-11-16 18:17:04.0319600", "NaT"), 3, "'NaT', no time"),
    "azure no such day": ("azure", AZURE.replace("2023-11-16 18:17:04.03", "2023-02-30 18:17:04.03"), 3, "2023-02-30"),
    "azure no such hour": ("azure", AZURE.replace("18:17:04.03", "25:17:04.03"), 3, "T25:17"),
    "azure epoch": ("azure", AZURE.replace("2023-11-16 18:17:04.0319600", "1700158623.9"), 3, "'1700158623.9'"),
    "azure disorder": ("azure", AZURE.replace("18:17:04.03", "18:16:04.03"), 3, "before the request of line 2"),
    "azure not utf-8": ("azure", AZURE.encode().replace(b"3180", b"31\xff0"), 3, r"byte 31 of the line, b'\\xff'"),
    "azure nul": ("azure", AZURE.replace("3180", "31\0"), 3, "NUL"),
    "mooncake missing key": ("mooncake", edited("mooncake", 1, hash_ids=None), 2, "key 'hash_ids' is missing"),
    "mooncake zero": ("mooncake", edited("mooncake", 1, output_length=0), 2, "output_length is 0"),
    "mooncake negative": ("mooncake", edited("mooncake", 1, output_length=-2), 2, "output_length is -2"),
    "mooncake decimal": ("mooncake", edited("mooncake", 1, output_length=2.5), 2, "output_length is 2.5"),
    "mooncake text": ("mooncake", edited("mooncake", 1, output_length="4"), 2, "output_length is '4'"),
    "mooncake bool": ("mooncake", edited("mooncake", 1, output_length=True), 2, "output_length is True"),
    "mooncake null": (
        "mooncake",
        CONTENT["mooncake"].replace('"output_length": 4', '"output_length": null'),
        2,
        "output_length is None",
    ),
    "mooncake nan time": ("mooncake", edited("mooncake", 2, timestamp=float("nan")), 3, "timestamp is nan"),
    "mooncake endless time": ("mooncake", edited("mooncake", 2, timestamp=float("inf")), 3, "timestamp is inf"),
    "mooncake text time": ("mooncake", edited("mooncake", 2, timestamp="9"), 3, "timestamp is '9'"),
    "mooncake disorder": ("mooncake", edited("mooncake", 2, timestamp=99), 3, "arrives at 99, before .* line 2 at 100"),
    "mooncake too few ids": ("mooncake", edited("mooncake", 0, hash_ids=[7]), 1, "1 ids for a prompt of 1100 tokens"),
    "mooncake ids no list": ("mooncake", edited("mooncake", 0, hash_ids=7), 1, "hash_ids is 7"),
    "mooncake id decimal": ("mooncake", edited("mooncake", 0, hash_ids=[7, 3.0, 9]), 1, r"hash_ids\[1\] is 3.0"),
    "mooncake id negative": ("mooncake", edited("mooncake", 0, hash_ids=[7, 3, -9]), 1, r"hash_ids\[2\] is -9"),
    "mooncake no prefix": ("mooncake", edited("mooncake", 1, hash_ids=[3, 7]), 2, "follows another id"),
    "mooncake cut": ("mooncake", CONTENT["mooncake"][:-20], 3, "no complete JSON object"),
    "mooncake two on a line": ("mooncake", CONTENT["mooncake"].replace("}\n", "}"), 1, "no complete JSON object"),
    "mooncake array": ("mooncake", json.dumps(MOONCAKE), 1, "no JSON object"),
    "mooncake nested": ("mooncake", "[" * 200_000, 1, "no complete JSON object"),
    "mooncake long number": ("mooncake", "9" * 10_000, 1, "no complete JSON object"),
    "sharegpt ids disagree": ("sharegpt", edited("sharegpt", 1, input_toks=5), 2, "has 4 ids, input_toks is 5"),
    "sharegpt ids missing": ("sharegpt", edited("sharegpt", 1, input_tok_ids=None), 2, "'input_tok_ids' is missing"),
    "sharegpt disorder": ("sharegpt", edited("sharegpt", 2, arrival_time_ns=1046926807), 3, "before the request"),
    "vllm missing key": ("vllm", edited("vllm", 1, first_token_ts=None), 2, "key 'first_token_ts' is missing"),
    "vllm null": ("vllm", CONTENT["vllm"].replace("101.0", "null"), 1, "scheduled_ts is None"),
    "vllm times": ("vllm", edited("vllm", 1, first_token_ts=101.0), 2, "out of order"),
    "vllm disorder": ("vllm", edited("vllm", 1, queued_ts=99.0), 2, "before the request of line 1 at 100.5"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file(write, case):
    form, content, line, message = BROKEN[case]
    path = write(content)
    with pytest.raises(InputError, match=message) as caught:
        LOADERS[form](path)
    error = caught.value
    assert error.file == path and error.line == line
    assert str(error).startswith(f"{path}:{line}: ") and error.remedy
    assert len(str(error)) < 800  # the value is shown, not poured out


@pytest.mark.parametrize("load", [*LOADERS.values(), load_trace, find_workload, load_vllm_measured])
def test_what_is_no_text_file(write, tmp_path, load):
    rng = np.random.default_rng(0)
    garbage = rng.integers(0, 256, 4000, dtype=np.uint8).tobytes()
    for path, message in (
        (write(b"", "empty"), "is empty"),
        (write("\n \n\r\n", "blank"), "is empty"),
        (tmp_path, "is a directory"),
        (write(b"\xff" + garbage, "garbage"), "not UTF-8"),
        (write(b"\x1f\x8b" + garbage, "packed.gz"), "compressed.*Decompress"),
        (write(b"\0" * 100, "zeros"), "NUL"),
        (write("one line of prose\nand another", "prose"), "."),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load(path)
        assert caught.value.file == path


@pytest.mark.parametrize("load", [*LOADERS.values(), load_trace, load_vllm_measured])
def test_missing_file(tmp_path, load):
    for path in (tmp_path / "none.csv", tmp_path / ("x" * 3000), Path("a\0b")):
        with pytest.raises(InputError, match="no such file"):
            load(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no regular file"):
        load_trace(tmp_path / "pipe")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything")
def test_unreadable_file(write):
    path = write(AZURE)
    path.chmod(0)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        load_azure(path)


@pytest.mark.parametrize("load", [load_azure, load_mooncake, load_trace])
def test_endless_line_is_not_read_into_memory(tmp_path, load):
    """A line of 10 GB (a sparse file: it takes no disk) is given up at the limit."""
    path = tmp_path / "endless"
    with path.open("wb") as file:
        file.write(AZURE.encode() if load is load_azure else b'{"timestamp": ')
        file.truncate(10 << 30)
    tracemalloc.start()
    with pytest.raises(InputError, match=f"longer than {MAX_LINE_BYTES} bytes") as caught:
        load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.line == (5 if load is load_azure else 1)
    assert peak < 4 * MAX_LINE_BYTES


def test_unknown_format_names_the_known_ones(write):
    for content in ("a,b,c\n1,2,3\n", '{"a": 1}\n', "[]\n"):
        with pytest.raises(
            InputError, match=r"no known trace format.*ContextTokens.*hash_ids.*arrival_time_ns.*queued_ts"
        ):
            load_trace(write(content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("TIMESTAMP,ContextTokens\n", "column 'GeneratedTokens' is missing"),
        ('{"timestamp": 1, "input_length": 3, "output_length": 4}\n', "'hash_ids' is missing"),
        ('{"input_toks": 3, "output_toks": 4}\n', "'arrival_time_ns' is missing"),
        (edited("vllm", 0, queued_ts=None), "'queued_ts' is missing"),
    ],
)
def test_nearly_known_format_says_what_is_missing(write, content, message):
    with pytest.raises(InputError, match=message):
        load_trace(write(content))


# --- Discovery -------------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path) -> Path:
    """A data folder with a small azure_conv and a small mooncake_synthetic."""
    folder = tmp_path / "shelf" / "request_traces"
    folder.mkdir(parents=True)
    (folder / TRACES["azure_conv"].file).write_text(AZURE)
    (folder / TRACES["mooncake_synthetic"].file).write_text(CONTENT["mooncake"])
    return folder.parent


def test_found_in_data_dir(offline, shelf, monkeypatch):
    file = shelf / "request_traces" / TRACES["azure_conv"].file
    for data_dir in (shelf, shelf / "request_traces", str(shelf)):
        w = find_workload("azure_conv", data_dir)
        assert len(w) == 3 and w.name == "azure_conv"
        assert w.source.startswith(f"Azure/AzurePublicDataset, CC-BY 4.0: file {file};")
    monkeypatch.setenv("SCHEDLAB_DATA", str(shelf))
    assert len(find_workload("mooncake_synthetic")) == 3
    assert find_trace_file("azure_conv") == (file, f"file {file}")


def test_data_dir_comes_before_the_environment(offline, shelf, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    (other / TRACES["azure_conv"].file).write_text("\n".join(AZURE.splitlines()[:3]))
    monkeypatch.setenv("SCHEDLAB_DATA", str(shelf))
    assert len(find_workload("azure_conv", other)) == 2
    assert len(find_workload("mooncake_synthetic", other)) == 3  # absent there, found in SCHEDLAB_DATA


@pytest.mark.parametrize("name", WORKLOADS)
def test_generated_where_absent(offline, tmp_path, name):
    w = find_workload(name, tmp_path).validate()
    assert w.name == name and w.source.startswith("generated: ")
    if name == "synthetic":
        assert "trace not found" not in w.source
    else:
        assert "fitted to the published percentiles of" in w.source and "trace not found (" in w.source
        assert ("SCHEDLAB_OFFLINE" in w.source) == bool(TRACES[name].url)


def test_corrupt_file_is_no_reason_to_generate(offline, shelf):
    file = shelf / "request_traces" / TRACES["azure_conv"].file
    file.write_text(AZURE.replace("3180", "?"))
    with pytest.raises(InputError, match=r"csv:3: ContextTokens is '\?'"):
        find_workload("azure_conv", shelf)
    file.unlink()
    file.symlink_to(shelf / "gone.csv")
    with pytest.raises(InputError, match="no such file"):
        find_workload("azure_conv", shelf)


def test_missing_folders_are_named(offline, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"data_dir is '.*nowhere', no folder"):
        find_workload("azure_conv", tmp_path / "nowhere")
    monkeypatch.setenv("SCHEDLAB_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"SCHEDLAB_DATA is '.*nowhere', no folder"):
        find_workload("azure_conv")


def test_corrupt_cache_is_an_error(offline, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / TRACES["azure_code"].file).write_text(AZURE)
    with pytest.raises(InputError, match=r"sha256 differs.*Delete it"):
        find_workload("azure_code")


@pytest.mark.parametrize("served", [True, False])
def test_failed_fetch_is_quiet_and_quick(offline, monkeypatch, tmp_path, capfd, served):
    """Nothing listens at the address, or another file lies there: requests are generated, once tried."""
    from dataclasses import replace
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(AZURE.encode())

        def log_message(self, format, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}/trace.csv"
    if served:
        Thread(target=server.serve_forever, daemon=True).start()
    else:
        server.server_close()
    monkeypatch.setenv("SCHEDLAB_OFFLINE", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(TRACES, "azure_code", replace(TRACES["azure_code"], url=url))
    started = time.monotonic()
    first, second = find_workload("azure_code"), find_workload("azure_code")
    if served:
        server.shutdown()
        server.server_close()
    assert time.monotonic() - started < traces.FETCH_TIMEOUT_S
    assert f"trace not found (fetching {url} failed: {'its sha256 differs' if served else 'Conn'}" in first.source
    assert second.source == first.source
    assert not any((tmp_path / "cache").glob("*"))
    assert capfd.readouterr() == ("", "")


def test_unknown_name(offline):
    with pytest.raises(InputError, match=r"called 'azure_cnv'.*Did you mean 'azure_conv'\?.*synthetic"):
        find_workload("azure_cnv")
    with pytest.raises(InputError, match=r"Names are azure_conv"):
        find_workload("y" * 5000)
    with pytest.raises(InputError, match="no trace is called 'synthetic'"):
        find_trace_file("synthetic")


# --- Real files ------------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("name", TRACES)
def test_real_trace(data_dir, name):
    w = find_workload(name, data_dir).validate()
    assert w.source.startswith(TRACES[name].publisher)
    assert spearman(w.output_tokens, w.predicted_output_tokens) == pytest.approx(DEFAULT_RANK_CORRELATION, abs=0.005)
    known = PUBLISHED[name if name in PUBLISHED else "sharegpt"]  # the measured runs served its requests
    assert len(w) == known.num_requests
    assert len(w) / w.arrival_s[-1] == pytest.approx(known.requests_per_s, rel=2e-3)
    gaps = np.diff(w.arrival_s)
    assert gaps.std() / gaps.mean() == pytest.approx(known.arrival_cv, rel=0.01 if name in PUBLISHED else 0.1)
    assert np.abs(np.percentile(w.prompt_tokens, PERCENTILES) - known.prompt_tokens).max() <= 0.6
    assert np.abs(np.percentile(w.output_tokens, PERCENTILES) - known.output_tokens).max() <= 0.6
    assert spearman(w.prompt_tokens, w.output_tokens) == pytest.approx(known.length_correlation, abs=0.01)


@pytest.mark.data
def test_real_prefixes(data_dir):
    w = find_workload("mooncake_synthetic", data_dir)
    assert w.prefix_hit_share() == pytest.approx(0.651, abs=0.002)
    assert w.with_block_tokens(16).validate().prefix_hit_share() == pytest.approx(w.prefix_hit_share())
    assert find_workload("sharegpt", data_dir).prefix_hit_share() == pytest.approx(0.076, abs=0.002)


@pytest.mark.data
@pytest.mark.parametrize("name", ["vllm_rtx4090", "vllm_rtxpro6000"])
def test_real_measurements(data_dir, name):
    path, _ = find_trace_file(name, data_dir)
    measured = load_vllm_measured(path)
    w = find_workload(name, data_dir)
    assert np.array_equal(measured.queued_s, w.arrival_s)
    assert np.array_equal(w.prompt_tokens, find_workload("sharegpt", data_dir).prompt_tokens)
    assert (measured.ttft_s > measured.queue_s).all() and (measured.e2e_s > measured.ttft_s).all()
    assert np.abs(measured.arrival_s - measured.queued_s).max() < 0.3
    assert 0.01 < np.nanmedian(measured.tpot_s) < 0.1


@pytest.mark.data
def test_loading_is_quick(data_dir):
    path, _ = find_trace_file("azure_conv", data_dir)
    load_azure(path)
    times = []
    for _ in range(3):
        started = time.process_time()
        load_azure(path)
        times.append(time.process_time() - started)
    assert min(times) < 0.5


@pytest.mark.data
def test_cut_download_is_noticed(data_dir, tmp_path):
    path, _ = find_trace_file("mooncake_synthetic", data_dir)
    shutil.copyfile(path, tmp_path / path.name)
    os.chmod(tmp_path / path.name, 0o600)
    with (tmp_path / path.name).open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(InputError, match=r"no complete JSON object.*broken download"):
        find_workload("mooncake_synthetic", tmp_path)
