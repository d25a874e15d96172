"""Files of requests: loaders of public trace formats, and `find_workload`, which finds or replaces them by name.

Every loader reads a file whole or raises one `InputError` with the file, the line, the value and the remedy. A
request with zero tokens is such an error too: it would never finish (the Azure traces of 2023 have none).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import InputError
from .generate import generate
from .workload import MAX_TOKENS, Workload, first_broken_prefix

MAX_LINE_BYTES = 16 << 20
"""Longest line that is read: a prompt of a million token ids takes about 8 MiB."""

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE_KEYS = ("timestamp", "input_length", "output_length", "hash_ids")
SHAREGPT_KEYS = ("input_toks", "output_toks", "arrival_time_ns")
VLLM_KEYS = (
    "input_toks",
    "output_toks",
    "arrival_time",
    "queued_ts",
    "scheduled_ts",
    "first_token_ts",
    "last_token_ts",
)
MOONCAKE_BLOCK_TOKENS = 512

_TIMESTAMP = re.compile(r"((?:19|20)\d\d-\d\d-\d\d)[ T](\d\d:\d\d:\d\d(?:\.\d{1,9})?)(?:Z|\+00:00)?", re.ASCII)
_WHOLE = re.compile(r"[+-]?\d{1,18}", re.ASCII)


# --- Lines ---------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(1-based number, text) of every line that is not blank. Memory is bounded by MAX_LINE_BYTES."""
    if os.path.isdir(path):
        raise InputError("is a directory, not a file of requests", remedy="Name a file in it", file=path)
    if not os.path.exists(path):
        raise InputError("no such file", remedy="Check the path", file=path)
    if not os.path.isfile(path):
        raise InputError("is no regular file", remedy="Copy the requests to a file and name that", file=path)
    number, is_blank = 0, True
    try:
        with path.open("rb") as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if number == 1 and raw.startswith(
                    (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
                ):
                    raise InputError("is a compressed file", remedy="Decompress it first", file=path, line=1)
                if len(raw) > MAX_LINE_BYTES:
                    raise InputError(
                        f"the line is longer than {MAX_LINE_BYTES} bytes, starting {raw[:20]!r}",
                        remedy="Give one request a line, in a text file",
                        file=path,
                        line=number,
                    )
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"byte {error.start + 1} of the line, {raw[error.start : error.start + 1]!r}, is not UTF-8",
                        remedy="Give a text file in UTF-8",
                        file=path,
                        line=number,
                    ) from error
                if "\0" in text:
                    raise InputError("holds a NUL byte", remedy="Give a text file, no binary", file=path, line=number)
                if text:
                    is_blank = False
                    yield number, text
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", remedy="Check it", file=path) from error
    if is_blank:
        raise InputError("is empty", remedy="Give a file with one request a line", file=path)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


@dataclass
class _Row:
    """One line's values by column name, with typed access; errors name the file and the line."""

    path: Path
    line: int
    values: dict[str, Any]

    def error(self, problem: str, remedy: str) -> InputError:
        return InputError(problem, remedy=remedy, file=self.path, line=self.line)

    def __getitem__(self, key: str) -> Any:
        try:
            return self.values[key]
        except KeyError:
            raise self.error(
                f"key {key!r} is missing among {_shown(sorted(self.values))}", "Give every request the same keys"
            ) from None

    def tokens(self, key: str) -> int:
        """A positive whole number."""
        value = self[key]
        if type(value) is not int:  # True is an int, too
            raise self.error(f"{key} is {_shown(value)}, no whole number", "Give a positive number of tokens")
        if not 1 <= value <= MAX_TOKENS:
            raise self.error(
                f"{key} is {value}, outside 1..{MAX_TOKENS}",
                "A request has at least one prompt token and yields at least one: correct or drop the line",
            )
        return value

    def number(self, key: str) -> float | int:
        """A finite number; whole ones stay exact."""
        value = self[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**63:  # nan fails too
            raise self.error(f"{key} is {_shown(value)}, no finite number", "Give a number")
        return value

    def ids(self, key: str) -> list[int]:
        value = self[key]
        if not isinstance(value, list):
            raise self.error(f"{key} is {_shown(value)}, no list", "Give a list of whole numbers")
        for i, element in enumerate(value):
            if type(element) is not int or element < 0:
                raise self.error(f"{key}[{i}] is {_shown(element)}, no id", "Give non-negative whole numbers")
        return value


def _json_rows(path: Path) -> Iterator[_Row]:
    for line, text in _lines(path):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            column = getattr(error, "colno", 1)
            raise InputError(
                f"no complete JSON object, at column {column}: {_shown(text[max(column - 20, 0) :])}",
                remedy="Give one JSON object a line; a cut last line means a broken download",
                file=path,
                line=line,
            ) from error
        if not isinstance(values, dict):
            raise InputError(
                f"holds {_shown(values)}, no JSON object", remedy="Give one JSON object a line", file=path, line=line
            )
        yield _Row(path, line, values)


class _Requests:
    """Collects the requests of one file, line by line, and makes the workload of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[int] = []
        self.times: list[int | float] = []
        self.prompts: list[int] = []
        self.outputs: list[int] = []
        self.offsets = [0]
        self.hashes: list[int] = []

    def add(self, line: int, time: int | float, prompt: int, output: int, hashes: Iterable[int] = ()) -> None:
        self.lines.append(line)
        self.times.append(time)
        self.prompts.append(prompt)
        self.outputs.append(output)
        self.hashes.extend(hashes)
        self.offsets.append(len(self.hashes))

    def workload(
        self, unit_s: float, hash_block_tokens: int = 0, shown: Sequence[object] = (), note: str = ""
    ) -> Workload:
        """Times count `unit_s` seconds; `shown` are the times as the file has them, where `times` are not."""
        # From the first time: whole numbers are subtracted exactly before they become floats.
        times = np.array([time - self.times[0] for time in self.times], np.float64)
        falls = np.flatnonzero(times[1:] < times[:-1])
        if len(falls):
            i = int(falls[0])
            before, after = (shown or self.times)[i : i + 2]
            raise InputError(
                f"arrives at {_shown(after)}, before the request of line {self.lines[i]} at {_shown(before)}",
                remedy="Sort the requests by arrival",
                file=self.path,
                line=self.lines[i + 1],
            )
        offsets, hashes = np.array(self.offsets, np.int64), np.array(self.hashes, np.int64)
        broken = first_broken_prefix(offsets, hashes)
        if broken is not None:
            raise InputError(
                "holds a hash id that follows another id than on an earlier line",
                remedy="An id must stand for the whole prompt up to and with its block",
                file=self.path,
                line=self.lines[broken],
            )
        return Workload.from_arrays(
            self.path.stem,
            times * unit_s,
            self.prompts,
            self.outputs,
            hash_offsets=offsets,
            hash_ids=hashes,
            hash_block_tokens=hash_block_tokens,
            source=f"file {self.path}{note}",
        )


# --- Formats -------------------------------------------------------------------------------------------------------


def load_azure(path: str | PathLike[str]) -> Workload:
    """CSV of the Azure LLM inference traces: TIMESTAMP, ContextTokens, GeneratedTokens. Raises InputError.

    Timestamps have up to nine decimals. Other columns are ignored. Reference: Patel et al. 2024, "Splitwise".
    """
    path = Path(path)
    lines_of_file = _lines(path)
    header_line, header_text = next(lines_of_file)
    header = [name.strip() for name in header_text.split(",")]
    for name in AZURE_COLUMNS:
        if header.count(name) != 1:
            raise InputError(
                f"column {name!r} is {'missing' if name not in header else 'doubled'} in header {_shown(header_text)}",
                remedy=f"Give the columns {','.join(AZURE_COLUMNS)}",
                file=path,
                line=header_line,
            )
    at_time = header.index(AZURE_COLUMNS[0])
    lengths = {name: header.index(name) for name in AZURE_COLUMNS[1:]}
    requests, stamps = _Requests(path), []
    for line, text in lines_of_file:
        cells = text.split(",")
        if len(cells) != len(header):
            raise InputError(
                f"{len(cells)} values for {len(header)} columns: {_shown(text)}",
                remedy="Give one value a column; a cut last line means a broken download",
                file=path,
                line=line,
            )
        row = _Row(path, line, {name: _cell(cells[at]) for name, at in lengths.items()})
        match = _TIMESTAMP.fullmatch(cells[at_time].strip())
        if match is None:
            raise _bad_timestamp(path, line, cells[at_time])
        stamps.append(f"{match[1]}T{match[2]}")
        requests.add(line, 0, row.tokens("ContextTokens"), row.tokens("GeneratedTokens"))
    if not stamps:
        raise InputError("holds a header but no request", remedy="Give one request a line", file=path, line=header_line)
    try:
        requests.times = np.array(stamps, "datetime64[ns]").astype(np.int64).tolist()
    except ValueError:  # the calendar has no such day or hour: find the line
        for line, stamp in zip(requests.lines, stamps, strict=True):
            try:
                np.datetime64(stamp, "ns")
            except ValueError:
                raise _bad_timestamp(path, line, stamp) from None
        raise
    return requests.workload(1e-9, shown=stamps)


def _cell(text: str) -> int | str:
    """A whole number where the cell is one; else the text, for the error."""
    return int(text) if _WHOLE.fullmatch(text.strip()) else text


def _bad_timestamp(path: Path, line: int, value: str) -> InputError:
    return InputError(
        f"TIMESTAMP is {_shown(value)}, no time", remedy="Write 2023-11-16 18:17:03.9799600", file=path, line=line
    )


def load_mooncake(path: str | PathLike[str]) -> Workload:
    """JSON lines of the Mooncake traces: timestamp (ms), input_length, output_length, hash_ids. Raises InputError.

    A hash id stands for the prompt up to and with a block of 512 tokens. The traces count the partial last block
    too; it is dropped here, for engines share full blocks only. Reference: Qin et al., FAST 2025, "Mooncake".
    """
    path = Path(path)
    requests, dense = _Requests(path), dict[int, int]()
    for row in _json_rows(path):
        prompt, ids = row.tokens("input_length"), row.ids("hash_ids")
        full_blocks = prompt // MOONCAKE_BLOCK_TOKENS
        if len(ids) not in (full_blocks, -(-prompt // MOONCAKE_BLOCK_TOKENS)):
            raise row.error(
                f"hash_ids has {len(ids)} ids for a prompt of {prompt} tokens",
                f"Give one id for every {MOONCAKE_BLOCK_TOKENS} tokens",
            )
        hashes = [dense.setdefault(h, len(dense)) for h in ids[:full_blocks]]
        requests.add(row.line, row.number("timestamp"), prompt, row.tokens("output_length"), hashes)
    return requests.workload(1e-3, MOONCAKE_BLOCK_TOKENS)


def load_sharegpt(path: str | PathLike[str], hash_block_tokens: int = 16) -> Workload:
    """JSON lines of LLMServingSim: input_toks, output_toks, arrival_time_ns, and input_tok_ids. Raises InputError.

    Where token ids are given, prompts are cut into blocks of `hash_block_tokens` and equal prefixes get equal ids
    (compared token by token, no hash can collide); 0 leaves prefixes out.
    """
    path = Path(path)
    if hash_block_tokens < 0:
        raise InputError(f"hash_block_tokens is {hash_block_tokens}", remedy="Give a block size, or 0 for no prefixes")
    requests, blocks = _Requests(path), dict[tuple[int, tuple[int, ...]], int]()
    has_ids: bool | None = None
    for row in _json_rows(path):
        prompt, hashes = row.tokens("input_toks"), list[int]()
        has_ids = "input_tok_ids" in row.values if has_ids is None else has_ids
        if has_ids:
            ids = row.ids("input_tok_ids")
            if len(ids) != prompt:
                raise row.error(f"input_tok_ids has {len(ids)} ids, input_toks is {prompt}", "Make them agree")
            parent = -1
            for end in range(hash_block_tokens, prompt + 1, hash_block_tokens) if hash_block_tokens else ():
                parent = blocks.setdefault((parent, tuple(ids[end - hash_block_tokens : end])), len(blocks))
                hashes.append(parent)
        requests.add(row.line, row.number("arrival_time_ns"), prompt, row.tokens("output_toks"), hashes)
    return requests.workload(1e-9, hash_block_tokens if has_ids else 0)


@dataclass(frozen=True)
class VllmMeasured:
    """Times measured in a vLLM run, in seconds, one entry a request in order of arrival.

    The log has two clocks: `arrival_time` is the client's, the `_ts` fields are the engine's. Differences are
    therefore taken on the engine's clock alone: TTFT and E2E start when the request enters the engine's queue.
    """

    arrival_s: np.ndarray  # (N,) float64, client clock, from the first arrival
    queued_s: np.ndarray  # (N,) float64, engine clock, from the first queued_ts
    queue_s: np.ndarray  # (N,) float64, scheduled_ts - queued_ts
    ttft_s: np.ndarray  # (N,) float64, first_token_ts - queued_ts
    tpot_s: np.ndarray  # (N,) float64, (last_token_ts - first_token_ts) / (output_tokens - 1); nan for one token
    e2e_s: np.ndarray  # (N,) float64, last_token_ts - queued_ts
    handover_s: np.ndarray
    """(N,) float64: queued_ts - arrival_time, less its smallest value (which hides the offset of the clocks). The
    engine takes requests in between iterations, so this is the wait for the running iteration, at least."""


def load_vllm_requests(path: str | PathLike[str], arrivals: str = "queued_ts") -> Workload:
    """The requests of a vLLM log (JSON lines of LLMServingSim's measurements). Raises InputError.

    `arrivals` names the field that is taken for the arrival: "queued_ts", the start of the times in
    `load_vllm_measured`, or "arrival_time", the client's.
    """
    if arrivals not in ("queued_ts", "arrival_time"):
        raise InputError(f"arrivals is {arrivals!r}", remedy="Choose 'queued_ts' or 'arrival_time'")
    requests = _Requests(Path(path))
    for row in _vllm_rows(requests.path):
        requests.add(row.line, row.values[arrivals], row.values["input_toks"], row.values["output_toks"])
    return requests.workload(1.0, note=f" ({arrivals})")


def load_vllm_measured(path: str | PathLike[str]) -> VllmMeasured:
    """The times of a vLLM log, for comparison with a simulation of `load_vllm_requests`. Raises InputError."""
    load_vllm_requests(path)  # checks the order, so that both have the same rows
    rows = list(_vllm_rows(Path(path)))
    log = {key: np.array([row.values[key] for row in rows]) for key in VLLM_KEYS}
    steps = log["output_toks"] - 1
    decode_s = log["last_token_ts"] - log["first_token_ts"]
    handover_s = log["queued_ts"] - log["arrival_time"]
    return VllmMeasured(
        arrival_s=log["arrival_time"] - log["arrival_time"][0],
        queued_s=log["queued_ts"] - log["queued_ts"][0],
        queue_s=log["scheduled_ts"] - log["queued_ts"],
        ttft_s=log["first_token_ts"] - log["queued_ts"],
        tpot_s=np.divide(decode_s, steps, out=np.full(len(steps), math.nan), where=steps > 0),
        e2e_s=log["last_token_ts"] - log["queued_ts"],
        handover_s=handover_s - handover_s.min(),
    )


def _vllm_rows(path: Path) -> Iterator[_Row]:
    """Rows with every key checked, and the engine's times in order."""
    for row in _json_rows(path):
        for key in VLLM_KEYS:
            row.tokens(key) if key.endswith("_toks") else row.number(key)
        times = [row.values[key] for key in VLLM_KEYS[3:]]
        if times != sorted(times):
            raise row.error(
                f"{', '.join(VLLM_KEYS[3:])} are {times}, out of order", "Drop the request or correct its times"
            )
        yield row


FORMATS: dict[str, tuple[Callable[..., Workload], tuple[str, ...]]] = {
    "azure": (load_azure, AZURE_COLUMNS),
    "mooncake": (load_mooncake, MOONCAKE_KEYS),
    "sharegpt": (load_sharegpt, SHAREGPT_KEYS),
    "vllm": (load_vllm_requests, VLLM_KEYS),
}
"""Loader and the columns or keys that it needs, by format."""


def load_trace(path: str | PathLike[str]) -> Workload:
    """Load a trace of any known format, recognised by its header or the keys of its first line."""
    path = Path(path)
    line, text = next(_lines(path))
    if text.startswith("{"):
        names = set(next(_json_rows(path)).values)
    else:
        names = {name.strip() for name in text.split(",")}
    shares = {name: len(names.intersection(keys)) / len(keys) for name, (_, keys) in FORMATS.items()}
    best = max(shares, key=lambda name: shares[name])
    if shares[best] < 0.5:
        known = "; ".join(f"{name}: {', '.join(keys)}" for name, (_, keys) in FORMATS.items())
        raise InputError(
            f"no known trace format, starts with {_shown(text)}",
            remedy=f"Known columns or keys are {known}",
            file=path,
            line=line,
        )
    return FORMATS[best][0](path)


# --- Discovery -----------------------------------------------------------------------------------------------------

FETCH_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class TraceFile:
    """A public trace: its file name, publisher, and where it may be fetched from."""

    file: str
    publisher: str
    load: Callable[..., Workload]
    url: str = ""
    """Empty: never fetched."""
    sha256: str = ""


_AZURE_URL = "https://raw.githubusercontent.com/Azure/AzurePublicDataset/master/data/"
_LLMSERVINGSIM = "casys-kaist/LLMServingSim, MIT"

TRACES: dict[str, TraceFile] = {
    "azure_conv": TraceFile(
        "AzureLLMInferenceTrace_conv.csv",
        "Azure/AzurePublicDataset, CC-BY 4.0",
        load_azure,
        _AZURE_URL + "AzureLLMInferenceTrace_conv.csv",
        "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
    ),
    "azure_code": TraceFile(
        "AzureLLMInferenceTrace_code.csv",
        "Azure/AzurePublicDataset, CC-BY 4.0",
        load_azure,
        _AZURE_URL + "AzureLLMInferenceTrace_code.csv",
        "54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6",
    ),
    "mooncake_synthetic": TraceFile(
        "mooncake_synthetic_trace.jsonl",
        "kvcache-ai/Mooncake, Apache-2.0",
        load_mooncake,
        "https://raw.githubusercontent.com/kvcache-ai/Mooncake/main/FAST25-release/traces/synthetic_trace.jsonl",
        "bd070915a98fc0ed264d7cfef2ce746002eb3076a695ec31ba2674c0111ec131",
    ),
    "sharegpt": TraceFile("sharegpt-llama-3.1-8b-300-sps10.jsonl", _LLMSERVINGSIM, load_sharegpt),
    "vllm_rtx4090": TraceFile("RTX4090_Llama-3.1-8B_vllm_requests.jsonl", _LLMSERVINGSIM, load_vllm_requests),
    "vllm_rtxpro6000": TraceFile("RTXPRO6000_Llama-3.1-8B_vllm_requests.jsonl", _LLMSERVINGSIM, load_vllm_requests),
}
"""Traces known by name."""

WORKLOADS = (*TRACES, "synthetic")
"""Names that `find_workload` knows."""

_fetch_failures: dict[str, str] = {}  # by name: one failed attempt a process is enough


def find_trace_file(name: str, data_dir: str | PathLike[str] | None = None) -> tuple[Path | None, str]:
    """The file of a trace in `TRACES`, or None, and how it was found or why it was not.

    Looked for in `data_dir`, then $SCHEDLAB_DATA (each as the folder itself or its request_traces/), then the
    download cache ($SCHEDLAB_CACHE, else the user's cache folder); then fetched from the publisher, unless
    SCHEDLAB_OFFLINE=1.
    """
    if name not in TRACES:
        raise InputError(f"no trace is called {name!r}", remedy=f"Names are {', '.join(TRACES)}")
    trace = TRACES[name]
    for label, folder in (("data_dir", data_dir), ("SCHEDLAB_DATA", os.environ.get("SCHEDLAB_DATA"))):
        if not folder:
            continue
        folder = Path(folder).expanduser()
        if not os.path.isdir(folder):
            raise InputError(f"{label} is {str(folder)!r}, no folder", remedy="Name a folder with traces, or none")
        for path in (folder / trace.file, folder / "request_traces" / trace.file):
            if os.path.lexists(path):
                return path, f"file {path}"
    if not trace.url:
        return None, "it is not fetched by itself: put it into a folder and name that in SCHEDLAB_DATA"
    return _fetch(name, trace)


def _fetch(name: str, trace: TraceFile) -> tuple[Path | None, str]:
    import pooch  # 0.1 s to import, and needed only here

    folder = Path(os.environ.get("SCHEDLAB_CACHE") or pooch.os_cache("schedlab"))
    path = folder / trace.file
    if os.path.lexists(path):
        if not os.path.isfile(path) or pooch.file_hash(str(path)) != trace.sha256:
            raise InputError(
                "the cached file is not the published one (its sha256 differs)",
                remedy="Delete it, it will be fetched again",
                file=path,
            )
        return path, f"cached download {path}"
    if os.environ.get("SCHEDLAB_OFFLINE", "0") not in ("", "0"):
        return None, "not fetched, SCHEDLAB_OFFLINE is set"
    if name not in _fetch_failures:
        try:
            pooch.get_logger().setLevel("ERROR")
            downloader = pooch.HTTPDownloader(timeout=FETCH_TIMEOUT_S)
            pooch.retrieve(trace.url, trace.sha256, fname=trace.file, path=folder, downloader=downloader)
            return path, f"fetched from {trace.url}"
        except Exception as error:  # no network, no space, another file at the address: all mean "not here"
            reason = "its sha256 differs" if isinstance(error, ValueError) else type(error).__name__
            _fetch_failures[name] = f"fetching {trace.url} failed: {reason}"
    return None, _fetch_failures[name]


def find_workload(name_or_path: str | PathLike[str], data_dir: str | PathLike[str] | None = None) -> Workload:
    """The workload of a name in `WORKLOADS`, or of a trace file of any known format. Raises InputError.

    A named trace that is nowhere to be found is replaced by requests generated from its published percentiles, and
    `source` says so. A file that is there but broken is an error.
    """
    name = os.fspath(name_or_path)
    if name in TRACES:
        trace = TRACES[name]
        file, how = find_trace_file(name, data_dir)
        if file is not None:
            loaded = trace.load(file)
            source = loaded.source.replace(f"file {file}", f"{trace.publisher}: {how}", 1)
            return replace(loaded, name=name, source=source)
        made = generate(name)
        return replace(made, source=f"{made.source}; trace not found ({how})")
    if name == "synthetic":
        return generate("synthetic")
    path = Path(name).expanduser()
    if not os.path.exists(path):
        close = get_close_matches(name, WORKLOADS, n=1)
        raise InputError(
            f"no workload and no file is called {name!r}",
            remedy=(f"Did you mean {close[0]!r}? " if close else "") + f"Names are {', '.join(WORKLOADS)}",
        )
    return load_trace(path)
