"""The preprocessor: formats, bad input, cleaning, output that does not depend on how it was made."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_samoe.datasets import manifest
from megatron_samoe.datasets.indexed_dataset import IndexedDataset
from megatron_samoe.datasets.inspect import verify
from megatron_samoe.datasets.preprocess import cleaning, dedup, run
from megatron_samoe.errors import DataError
from megatron_samoe.log import logger
from tests.harness.datasets import content, decoded, jsonl, options
from tests.harness.tables import table
from tests.hostile.corpus_changes import COLUMNS, column

TEXTS = ["Emma Woodhouse, handsome", "", "née – 日本 🙂", "a\nb\r\nc", "x" * 300, " ", 'quote " and \\']


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix == ".zst":  # of two frames
        zstandard = pytest.importorskip("zstandard")
        halves = data[: len(data) // 2], data[len(data) // 2 :]
        return b"".join(zstandard.ZstdCompressor().compress(half) for half in halves)
    return {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix](data)


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_jsonl_plain_and_compressed(tmp_path: Path, suffix: str) -> None:
    texts = TEXTS * 9
    (tmp_path / f"in.jsonl{suffix}").write_bytes(compressed(jsonl(texts), suffix))
    report = run.preprocess(options(tmp_path, f"in.jsonl{suffix}"))
    assert decoded(tmp_path / "out_text_document") == texts
    assert report.num_documents == len(texts) == report.totals.num_lines and report.totals.num_bad == 0
    assert len(verify(str(tmp_path / "out_text_document"))) == 3
    assert sorted(path.suffix for path in tmp_path.glob("out*")) == [".bin", ".idx", ".json"], "nothing is left over"


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_parquet(tmp_path: Path, suffix: str) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    sink = io.BytesIO()
    rows = pyarrow.table({"text": [*TEXTS, None], "other": ["o"] * 8})
    parquet.write_table(rows, sink, row_group_size=3)
    (tmp_path / f"in.parquet{suffix}").write_bytes(compressed(sink.getvalue(), suffix))
    with pytest.raises(DataError, match="null in the column 'text'"):
        run.preprocess(options(tmp_path, f"in.parquet{suffix}"))
    report = run.preprocess(options(tmp_path, f"in.parquet{suffix}", on_bad_input="skip", json_keys=("text", "other")))
    assert decoded(tmp_path / "out_text_document") == TEXTS and report.totals.num_bad == 1
    assert decoded(tmp_path / "out_other_document") == ["o"] * 7
    with pytest.raises(DataError, match="no column 'txet'; its columns are text, other"):
        run.preprocess(options(tmp_path, f"in.parquet{suffix}", json_keys=("txet",)))


#: Types of Parquet columns that hold text, by calls of pyarrow.
TEXTUAL = dict.fromkeys(("string()", "large_string()", "string_view()"), "one")
TEXTUAL |= dict.fromkeys(("binary()", "large_binary()"), b"one")


@pytest.mark.parametrize("on_bad_input", ["fail", "skip"])
def test_a_parquet_column_of_every_type(tmp_path: Path, on_bad_input: str) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    given = options(tmp_path, "in.parquet", on_bad_input=on_bad_input)
    texts = {kind: column(kind, value) for kind, value in TEXTUAL.items()}
    for name, values in {**texts, "dictionary": texts["string()"].dictionary_encode()}.items():
        parquet.write_table(pa.table({"text": values}), tmp_path / "in.parquet")
        run.preprocess(given)
        assert decoded(tmp_path / "out_text_document") == ["one"] * 16, name
    others = [column(kind, value) for kind, value in COLUMNS.items() if kind not in (*TEXTUAL, "null()")]
    for values in (*others, column("int8()", 7).dictionary_encode()):
        parquet.write_table(pa.table({"text": values}), tmp_path / "in.parquet")
        with pytest.raises(DataError, match=r"in\.parquet: the column 'text' holds .*, and must hold text"):
            run.preprocess(given)
    parquet.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "in.parquet")
    with pytest.raises(DataError, match=r"in\.parquet has 2 columns 'text'"):
        run.preprocess(given)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_line_of_many_chunks_is_read_once(tmp_path: Path, suffix: str) -> None:
    """Bytes that the process has read, as Linux counts them: with each chunk read up to the line's end, 128 times as many."""
    size = 16 << 20
    content = jsonl(["first"]) + b'{"text": "' + b"x" * size + b'"}\n' + jsonl(["last"])
    (tmp_path / f"in.jsonl{suffix}").write_bytes(compressed(content, suffix))
    before = _bytes_read()
    report = run.preprocess(
        options(tmp_path, f"in.jsonl{suffix}", on_bad_input="skip", chunk_bytes=1 << 16, max_document_bytes=1 << 20)
    )
    assert _bytes_read() - before < 2 * size
    assert decoded(tmp_path / "out_text_document") == ["first", "last"] and report.totals.num_bad >= 1


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_an_empty_corpus_names_its_files(tmp_path: Path) -> None:
    for name, lines in zip("abcde", (b"\n", b"", b"\n\n", b'{"text": ""}\n', b'{"text": ""}'), strict=True):
        (tmp_path / f"{name}.jsonl").write_bytes(lines)
        with pytest.raises(DataError, match=rf"The corpus is empty: \S*{name}\.jsonl hold"):
            run.preprocess(options(tmp_path, f"{name}.jsonl"))
    with pytest.raises(DataError, match=r"The corpus is empty: .*a\.jsonl, .*b\.jsonl, .*c\.jsonl and 2 more hold"):
        run.preprocess(options(tmp_path, "*.jsonl"))


def test_a_folder_of_which_some_files_are_no_corpus(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/LICENSE").write_text("without a suffix")
    with pytest.raises(DataError, match=r"texts' has 1 files, 0 of them named .*, \.txt.*texts/\*\*' takes all"):
        run.preprocess(options(tmp_path, "texts"))
    (tmp_path / "texts/a.txt").write_text("with one")
    made = replace(options(tmp_path, "texts"), output_prefix=str(tmp_path / "new/folder/out"))
    run.preprocess(made)
    assert decoded(tmp_path / "new/folder/out_text_document") == ["with one"]
    assert "has 2 files, 1 of them named" in caplog.text
    run.preprocess(options(tmp_path, "texts/**"))
    assert sorted(decoded(tmp_path / "out_text_document")) == ["with one", "without a suffix"]


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Title\n\nCHAPTER I\nOne.\n\nCHAPTER II\nTwo.\n")
    (tmp_path / "b.txt").write_text("\ufeffwhole")
    run.preprocess(options(tmp_path, "*.txt"))
    assert decoded(tmp_path / "out_text_document") == ["Title\n\nCHAPTER I\nOne.\n\nCHAPTER II\nTwo.\n", "whole"]
    run.preprocess(options(tmp_path, "a.txt", document_separator="CHAPTER"))
    assert decoded(tmp_path / "out_text_document") == ["Title", "CHAPTER I\nOne.", "CHAPTER II\nTwo."]
    run.preprocess(options(tmp_path, "a.txt", document_separator="blank-line"))
    assert decoded(tmp_path / "out_text_document") == ["Title", "CHAPTER I\nOne.", "CHAPTER II\nTwo."]


@pytest.mark.parametrize("letter", ["a", "\u00e9", "\u4e2d"])
def test_long_text_is_cut_into_documents(tmp_path: Path, letter: str) -> None:
    def documents(text: str) -> list[str]:
        (tmp_path / "a.txt").write_text(text)
        run.preprocess(options(tmp_path, "a.txt", document_bytes=100))
        return decoded(tmp_path / "out_text_document")

    line = letter * 12
    for end in ("\n", " ", ""):  # lines, one line with words, and one without
        found = documents((line + end) * 60)
        assert "".join("".join(found).split()) == line * 60 and "\ufffd" not in "".join(found)
        sizes = [len(document.encode()) for document in found]
        assert min(sizes[:-1]) >= 100 and max(sizes) < 400
    # Where there are paragraphs, it is they that end documents.
    paragraph = f"{line}\n{line}"
    assert all(document.endswith(paragraph) for document in documents(f"{paragraph}\n\n" * 20))


def test_a_text_of_one_document_is_told_of_the_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Paragraph.\n\n" * 200)
    said = run.preprocess(options(tmp_path, "a.txt")).describe()
    assert said.startswith("1 documents") and "--document-kb" in said and "--valid-data-path" in said
    assert "--split" not in run.preprocess(options(tmp_path, "a.txt", document_bytes=50)).describe()


def test_end_of_document_and_empty_documents(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(["ab", "", "c"]))
    run.preprocess(options(tmp_path, "in.jsonl", append_eod=True))
    data = IndexedDataset(str(tmp_path / "out_text_document"))
    assert [data.document(i).tolist() for i in range(3)] == [[97, 98, 256], [], [99, 256]]
    assert data.document_indices.tolist() == [0, 1, 1, 2]


def test_sentences(tmp_path: Path) -> None:
    text = 'Mr. Knightley came. "Was it late?" It was 9 p.m. or so!\n\nNew paragraph'
    sentences = ["Mr. Knightley came.", '"Was it late?"', "It was 9 p.m. or so!", "New paragraph"]
    assert cleaning.split_sentences(text, False) == sentences
    assert "".join(cleaning.split_sentences(text, True)) == text
    (tmp_path / "in.jsonl").write_bytes(jsonl([text, "", "One"]))
    run.preprocess(options(tmp_path, "in.jsonl", split_sentences=True, append_eod=True))
    data = IndexedDataset(str(tmp_path / "out_text_sentence"))
    assert data.document_indices.tolist() == [0, 4, 4, 5]
    assert bytes(data[2].tolist()).decode() == sentences[2], "only the last sentence has the end of the document"
    assert data[3].tolist()[-1] == 256 and data[4].tolist()[-1] == 256


BAD = {
    b'{"text": "cut': "not JSON",
    b'["text"]': "a JSON object was expected, not list",
    b'{"txt": "x"}': "no key 'text'",
    b'{"text": 5}': "int under the key 'text'",
    b'{"text": "\xff"}': "is not UTF-8",
    b'{"text": "\\ud800"}': "half of a surrogate pair",
    b'{"text": ' + b"[" * 100_000: "not",
    b'{"text": 1' + b"0" * 5000 + b"}": "",
}


@pytest.mark.parametrize("line, reason", BAD.items(), ids=range(len(BAD)))
@pytest.mark.parametrize("chunk_bytes", [64, 1 << 20])
def test_bad_lines_are_named_by_file_and_line(tmp_path: Path, line: bytes, reason: str, chunk_bytes: int) -> None:
    good = jsonl(TEXTS * 3)
    (tmp_path / "a.jsonl").write_bytes(good)
    (tmp_path / "b.jsonl").write_bytes(good + b"\n" + line + b"\n" + good + line)
    where = rf"b\.jsonl:{len(TEXTS) * 3 + 2}: .*{reason}"
    with pytest.raises(DataError, match=where):
        run.preprocess(options(tmp_path, "a.jsonl", "b.jsonl", chunk_bytes=chunk_bytes))
    assert not list(tmp_path.glob("out*.bin")), "no output after a failure"
    report = run.preprocess(options(tmp_path, "a.jsonl", "b.jsonl", chunk_bytes=chunk_bytes, on_bad_input="skip"))
    assert decoded(tmp_path / "out_text_document") == TEXTS * 9 and "2 bad lines" in report.describe()
    assert [line for _, line, _ in report.totals.first_bad] == [len(TEXTS) * 3 + 2, len(TEXTS) * 6 + 3]
    saved = json.loads((tmp_path / "out.bad_input.json").read_text())
    assert saved["count"] == 2 and reason in saved["first"][0]["reason"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_truncated_archive(tmp_path: Path, suffix: str) -> None:
    random = np.random.default_rng(0)
    texts = [bytes(random.integers(32, 127, 200).astype(np.uint8)).decode() for _ in range(400)]
    whole = compressed(jsonl(texts), suffix)
    (tmp_path / f"in.jsonl{suffix}").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(DataError):
        run.preprocess(options(tmp_path, f"in.jsonl{suffix}", chunk_bytes=4096))
    (tmp_path / "more.jsonl").write_bytes(jsonl(["last"]))
    report = run.preprocess(options(tmp_path, f"in.jsonl{suffix}", "more.jsonl", on_bad_input="skip", chunk_bytes=4096))
    kept = decoded(tmp_path / "out_text_document")
    assert kept[:-1] == texts[: len(kept) - 1] and kept[-1] == "last" and report.totals.num_bad >= 1


def test_inputs_and_options_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(jsonl(["a"]))
    (tmp_path / "a.txt").write_text("a")
    for values, message in table(__file__)["refused"]:
        paths = {name: (str(tmp_path / values["input"]),) for name in values if name == "input"}
        with pytest.raises(DataError) as caught:
            run.preprocess(replace(options(tmp_path, "corpus.jsonl"), **values | paths))
        assert message in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_output_does_not_depend_on_workers_or_chunks(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(TEXTS * 40))
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS * 40)))
    found = set()
    for executor, workers, chunk_bytes in (("inline", 1, 1 << 20), ("inline", 1, 37), ("process", 3, 500)):
        how = {"executor": executor, "workers": workers, "chunk_bytes": chunk_bytes}
        run.preprocess(options(tmp_path, "*.jsonl*", append_eod=True, deduplicate="exact", **how))
        found.add((content(prefix := tmp_path / "out_text_document"), Path(f"{prefix}.manifest.json").read_bytes()))
    assert len(found) == 1 and len(decoded(prefix)) == len(TEXTS)


def test_cleaning(tmp_path: Path) -> None:
    pytest.importorskip("ftfy")
    english = "It is a truth universally acknowledged, that a single man must be in want of a wife."
    german = "Es ist eine allgemein anerkannte Wahrheit, dass ein Junggeselle eine Frau braucht."
    (tmp_path / "in.jsonl").write_bytes(
        jsonl([english, german, "short", "x" * 500, "cafÃ© olÃ©, the woman in the house."])
    )
    report = run.preprocess(
        options(tmp_path, "in.jsonl", fix_unicode=True, min_chars=10, max_chars=400, languages=("en",))
    )
    assert decoded(tmp_path / "out_text_document") == [english, "café olé, the woman in the house."]
    assert report.totals.left_out == {"another language": 1, "too short": 1, "too long": 1}
    assert manifest.read(str(tmp_path / "out_text_document")).counts["too short"] == 1
    with pytest.raises(DataError, match="'xx' is not known"):
        run.preprocess(options(tmp_path, "in.jsonl", languages=("xx",)))


def test_near_duplicates(tmp_path: Path) -> None:
    words = [f"word{n}" for n in range(200)]
    near = [*words[:100], "changed", *words[101:]]
    other = [f"other{n}" for n in range(200)]
    (tmp_path / "in.jsonl").write_bytes(jsonl([" ".join(words), " ".join(near), " ".join(other), " ".join(words)]))
    run.preprocess(options(tmp_path, "in.jsonl", deduplicate="exact"))
    assert len(decoded(tmp_path / "out_text_document")) == 3
    report = run.preprocess(options(tmp_path, "in.jsonl", deduplicate="minhash"))
    assert decoded(tmp_path / "out_text_document") == [" ".join(words), " ".join(other)]
    assert report.totals.left_out == {"duplicate": 2}


def test_minhash_estimates_the_overlap() -> None:
    words = [f"w{n}" for n in range(600)]
    for kept in (150, 300, 450):
        pair = " ".join(words[:kept]), " ".join(words)
        shingles = [len(set(zip(*(text.split()[i:] for i in range(5)), strict=False))) for text in pair]
        same = (dedup.signature(pair[0]) == dedup.signature(pair[1])).mean()
        assert abs(same - shingles[0] / shingles[1]) < 0.15
    bands, rows = dedup.choose_bands(0.8)
    assert bands * rows <= dedup.NUM_PERMUTATIONS and abs((1 / bands) ** (1 / rows) - 0.8) < 0.05


def test_key_set_is_a_set() -> None:
    random, mine, wanted = np.random.default_rng(0), dedup.KeySet(), set()
    for _ in range(60):
        keys = random.integers(0, 2000, int(random.integers(0, 50))).astype(np.uint64)
        assert mine.contains(keys).tolist() == [int(key) in wanted for key in keys]
        new = np.array(sorted({int(k) for k in keys} - wanted), dtype=np.uint64)
        mine.add(new)
        wanted.update(new.tolist())
    assert len(mine) == len(wanted)
