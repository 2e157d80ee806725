"""The peers that ``benchmark_data.py`` measures, one process each. Imports nothing of ours.

usage: benchmark_data_peers.py SUBJECT JSON
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from benchmark_data_subject import Result, Spec, main

# Third-party modules are imported by name where they are used: they need not be installed where this file is checked,
# and a process should load its own subject only.


def tokenizers_raw(spec: Spec) -> Result:
    """``Tokenizer.encode_batch`` on all cores, texts in memory; only its time counts."""
    tokenizer = import_module("tokenizers").Tokenizer.from_file(spec["tokenizer"] + "/tokenizer.json")
    texts = list(_texts(spec["corpus"]))
    tokens, started = 0, time.perf_counter()
    for first in range(0, len(texts), spec["batch"]):
        encoded = tokenizer.encode_batch(texts[first : first + spec["batch"]], add_special_tokens=False)
        tokens += sum(len(encoding) for encoding in encoded)
    return {"tokens": tokens + len(texts), "steady_seconds": time.perf_counter() - started}


def datasets_map(spec: Spec) -> Result:
    """``load_dataset`` and ``map(batched=True)``, which writes arrow files."""
    datasets = import_module("datasets")
    tokenizer = import_module("tokenizers").Tokenizer.from_file(spec["tokenizer"] + "/tokenizer.json")
    end = tokenizer.token_to_id(spec["end_of_document"])
    files = sorted(str(path) for path in Path(spec["corpus"]).glob("*.jsonl"))
    corpus = datasets.load_dataset("json", data_files=files, split="train", cache_dir=spec["output"])

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer.encode_batch(rows["text"], add_special_tokens=False)
        return {"input_ids": [[*encoding.ids, end] for encoding in encoded]}

    mapped = corpus.map(encode, batched=True, num_proc=spec["workers"], remove_columns=["text"])
    compute = import_module("pyarrow.compute")
    return {"tokens": compute.sum(compute.list_value_length(mapped.data.column("input_ids"))).as_py()}


def datatrove_tokenize(spec: Spec) -> Result:
    """``JsonlReader`` and ``DocumentTokenizer`` under ``LocalPipelineExecutor``; no shuffle of documents, as ours."""
    readers = import_module("datatrove.pipeline.readers")
    tokens = import_module("datatrove.pipeline.tokens")
    executor = import_module("datatrove.executor")
    output = Path(spec["output"])
    executor.LocalPipelineExecutor(
        pipeline=[
            readers.JsonlReader(spec["corpus"]),
            tokens.DocumentTokenizer(
                str(output / "tokens"),
                tokenizer_name_or_path=spec["tokenizer"] + "/tokenizer.json",
                eos_token=spec["end_of_document"],
                shuffle_documents=False,
            ),
        ],
        tasks=spec["workers"],
        workers=spec["workers"],
        logging_dir=str(output / "logs"),
    ).run()
    return {"tokens": sum(path.stat().st_size for path in output.glob("tokens/*.ds")) // 2}


def memmap(spec: Spec) -> Result:
    """The floor: a permutation and a memory map, inputs and labels as int64 and nothing else."""
    np = import_module("numpy")
    started = time.perf_counter()
    length, samples = spec["sequence_length"], spec["samples"]
    tokens = np.memmap(spec["prefix"] + ".bin", dtype=np.uint16, mode="r")
    order = np.random.default_rng(0).permutation((len(tokens) - 1) // length)
    steady = time.perf_counter()
    for sample in order[:samples].tolist():
        row = tokens[sample * length : sample * length + length + 1].astype(np.int64)
        _inputs, _labels = row[:-1], row[1:]
    return _read_result(spec, started, steady)


def megatron_plain(spec: Spec) -> Result:
    """``GPTDataset`` as pre-training uses it: documents are not looked at; masks and positions are made once."""
    return _megatron(spec, reset=False)


def megatron_same(spec: Spec) -> Result:
    """``GPTDataset`` with positions that restart at documents."""
    return _megatron(spec, reset=True)


def _megatron(spec: Spec, reset: bool) -> Result:
    np = import_module("numpy")
    gpt = import_module("megatron.core.datasets.gpt_dataset")
    indexed = import_module("megatron.core.datasets.indexed_dataset")
    split = import_module("megatron.core.datasets.utils").Split
    Path(spec["output"]).mkdir(parents=True, exist_ok=True)

    class Tokenizer:
        """What a GPTDataset asks of a tokenizer."""

        vocab_size, eod, pad = spec["vocab_size"], spec["end_of_document_id"], -1
        special_tokens_dict: dict[str, int] = {}  # noqa: RUF012 - read only
        unique_identifiers: dict[str, str] = {"class": "benchmark"}  # noqa: RUF012 - read only

    started = time.perf_counter()
    config = gpt.GPTDatasetConfig(
        random_seed=0,
        sequence_length=spec["sequence_length"],
        split="1,0,0",
        path_to_cache=spec["output"],  # empty: building the index counts, as in a first start
        reset_position_ids=reset,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=Tokenizer(),
    )
    shards = indexed.IndexedDataset(spec["prefix"])
    documents = np.arange(len(shards), dtype=np.int32)
    dataset = gpt.GPTDataset(shards, spec["prefix"], documents, spec["samples"], split.train, config)
    steady = time.perf_counter()
    found = dataset[0]
    for sample in range(1, spec["samples"]):
        found = dataset[sample]
    result = _read_result(spec, started, steady)
    assert found["tokens"].dtype == found["position_ids"].dtype == import_module("torch").int64
    return result


def datatrove_plain(spec: Spec) -> Result:
    """``DatatroveFolderDataset`` in an order of ours: it has none of its own."""
    return _datatrove(spec, None)


def datatrove_positions(spec: Spec) -> Result:
    """The same with positions that restart at documents, from the end-of-document id: the faster of its two ways."""
    return _datatrove(spec, spec["end_of_document_id"])


def _datatrove(spec: Spec, end_of_document_id: int | None) -> Result:
    np = import_module("numpy")
    library = import_module("datatrove.utils.dataset")
    started = time.perf_counter()
    dataset = library.DatatroveFolderDataset(
        str(Path(spec["prefix"]).parent / "ds"),
        spec["sequence_length"],
        filename_pattern="*.ds",
        token_size=2,
        return_positions=end_of_document_id is not None,
        positions_from_eos_token_id=end_of_document_id,
    )
    order = np.random.default_rng(0).permutation(len(dataset))
    steady = time.perf_counter()
    for sample in order[: spec["samples"]].tolist():
        row = dataset[sample]["input_ids"]
        _inputs, _labels = row[:-1], row[1:]
    return _read_result(spec, started, steady)


def megatron_open(spec: Spec) -> Result:
    """``IndexedDataset`` of every shard, kept: no sample is planned, its arrays for 10^9 would need 12 GB and more."""
    indexed = import_module("megatron.core.datasets.indexed_dataset")
    prefixes = sorted(str(path)[:-4] for path in Path(spec["folder"]).glob("*.idx"))
    started = time.perf_counter()
    opened = [indexed.IndexedDataset(prefix) for prefix in prefixes]
    tokens = sum(int(shards.sequence_lengths.sum()) for shards in opened)
    return {"tokens": tokens, "deliver_seconds": time.perf_counter() - started}


def _read_result(spec: Spec, started: float, steady: float) -> Result:
    now = time.perf_counter()
    tokens = spec["samples"] * spec["sequence_length"]
    return {"tokens": tokens, "deliver_seconds": now - started, "steady_seconds": now - steady}


def _texts(corpus: str) -> Iterator[str]:
    for path in sorted(Path(corpus).glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)


SUBJECTS = {
    "tokenizers_raw": (tokenizers_raw, ["tokenizers"]),
    "datasets_map": (datasets_map, ["datasets", "tokenizers"]),
    "datatrove_tokenize": (datatrove_tokenize, ["datatrove", "tokenizers"]),
    "memmap": (memmap, ["numpy"]),
    "megatron_plain": (megatron_plain, ["megatron-core", "torch"]),
    "megatron_same": (megatron_same, ["megatron-core", "torch"]),
    "datatrove_plain": (datatrove_plain, ["datatrove", "torch"]),
    "datatrove_positions": (datatrove_positions, ["datatrove", "torch"]),
    "megatron_open": (megatron_open, ["megatron-core"]),
}

if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(SUBJECTS)
