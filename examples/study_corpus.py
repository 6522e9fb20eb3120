#!/usr/bin/env python3
"""Makes the corpora of the studies in docs/results from Debian packages: 36.3 MB of English prose, and a larger one.

    python examples/study_corpus.py OUT                      # OUT/txt/*.txt; needs apt and dpkg, or the packages in OUT/deb
    python examples/study_corpus.py OUT --corpus kernel      # 214 MB of Linux: its documentation in English, and C

Packages and texts are compared with the checksums below, so everybody trains on the same bytes. The prose of four of the five
is in the public domain; `anarchism` and Linux are under the GPL 2.

    python examples/study_corpus.py OUT --documents runs/pool/data

compares the documents that a study made of them (`megatron-samoe study FILE --text OUT/txt --output-dir runs/pool`) with
docs/results/test_documents.tsv: which are held out for the test, and that no other split has one of them.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import io
import json
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Files = Mapping[str, bytes]
TEST_DOCUMENTS = Path(__file__).resolve().parents[1] / "docs/results/test_documents.tsv"


@dataclass(frozen=True)
class Source:
    """A text and the package that it comes from, with the SHA-256 of both.

    Attributes:
        folder: in the package, of the files that hold the text.
        read: what makes pieces of text of them.
    """

    package: str
    version: str
    package_sha256: str
    folder: str
    read: Callable[[Files], Iterator[str]]
    text: str
    text_sha256: str


def joined_lines(text: str) -> str:
    """Returns paragraphs as one line each, with an empty line between."""
    paragraphs = (paragraph.splitlines() for paragraph in re.split(r"\n\s*\n", text))
    lines = (" ".join(map(str.strip, paragraph)) for paragraph in paragraphs if "".join(paragraph).strip())
    return "\n\n".join(lines)


def markdown(files: Files) -> Iterator[str]:
    """Yields the prose of each Markdown file: no emphasis, no headings' marks, links by their words alone."""
    for name in sorted(files):
        if ".md" not in name:
            continue
        content = gzip.decompress(files[name]) if name.endswith(".gz") else files[name]
        text = content.decode("utf-8", "replace")
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
        text = re.sub(r"(?m)^\s*(?:\[.*?\]:.*|[-*_]{3,})\s*$", "", text)  # targets of links, rulers
        text = text.translate({ord(mark): None for mark in "*_`"})
        yield joined_lines(re.sub(r"(?m)^[#>]+\s*", "", text))


#: Elements of OSIS and ThML that begin or end a line.
_BREAKS = re.compile(r"<(?:p|lb|div|/p|/div|chapter|title|verse|l|lg|br|milestone)\b[^>]*>")


def sword_module(files: Files) -> Iterator[str]:
    """Yields the blocks of a SWORD module, Old Testament first: zlib streams, of which an index has place, size and size when
    unpacked, 32 bits each."""
    indices = sorted((name for name in files if name.endswith("zs")), key=lambda name: name.startswith("nt"))
    for name in indices:
        data = files[f"{name[:-1]}z"]
        whole = len(files[name]) // 12 * 12
        for start, size, _ in struct.iter_unpack("<III", files[name][:whole]):
            if size:
                yield _without_markup(zlib.decompress(data[start : start + size]).decode("utf-8", "replace"))


def _without_markup(text: str) -> str:
    text = re.sub(r"(?s)<note.*?</note>", "", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", _BREAKS.sub("\n", text))).replace("\0", "")
    return re.sub(r"\n\s*\n+", "\n", re.sub(r"[ \t]+", " ", text))


def linux_files(files: Files) -> Iterator[str]:
    """Yields the texts of a source package of Linux in its archive's order: documentation in English, and C files but those of
    drivers and tools, much of which repeats itself."""
    (archive,) = files.values()
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r|xz") as tree:
        for member in tree:
            _, _, name = member.name.partition("/")
            is_prose = name.startswith("Documentation/") and not name.startswith("Documentation/translations/")
            is_code = not name.startswith(("Documentation/", "drivers/", "tools/"))
            wanted = (".rst", ".txt") if is_prose else (".c",) if is_code else ()
            if member.isfile() and name.endswith(wanted):
                yield tree.extractfile(member).read().decode("utf-8", "replace")  # type: ignore[union-attr]


def r_vectors(files: Files) -> Iterator[str]:
    """Yields the character vectors of an R package's data, a line for each string: records of a size and a zlib stream, in R's
    binary serialization."""
    left = files["Rdata.rdb"]
    while left:
        unpacker = zlib.decompressobj()
        record = unpacker.decompress(left[4:])
        left = unpacker.unused_data
        yield joined_lines("\n".join(_strings(record)))


def _strings(record: bytes) -> Iterator[str]:
    """Yields the strings of a serialized vector; each is a word of flags, a length and bytes."""
    if record[:2] != b"X\n" or struct.unpack_from(">i", record, 2) != (3,):
        sys.exit("error: R's data are not in version 3 of its binary serialization")
    (encoding,) = struct.unpack_from(">i", record, 14)
    place = 18 + encoding
    kind, count = struct.unpack_from(">ii", record, place)
    if kind & 0xFF != 16:
        sys.exit("error: R's data are no character vector")
    place += 8
    for _ in range(count):
        (length,) = struct.unpack_from(">i", record, place + 4)
        place += 8 + length
        yield record[place - length : place].decode("utf-8", "replace")


_SWORD = "usr/share/sword/modules"
_PROSE = (
    Source(
        "anarchism", "15.3-4", "fc5f82ba6223bfdbcdee662980e5c1ec6fe6cd4f7aa60a0d08da2fcd61ecf178",
        "usr/share/doc/anarchism/markdown", markdown, "anarchism.txt",
        "cffdd6655c6e2676d868e2e62be6ae4abb37c57872a912f76290a796d8be7cd9",
    ),
    Source(
        "sword-text-web", "522.0-1", "b2029a802c44f1d6103de45e9ef5c64a9bd66466776e593e386b5ea84bfc110f",
        f"{_SWORD}/texts/ztext/engWEB2015eb", sword_module, "web_bible.txt",
        "117b5461c06b62e709f3654ce0df30ee40299e1388540227722bca5699cc7598",
    ),
    Source(
        "sword-comm-mhcc", "2.0-2", "7d2c2a4b4914b63e86f20955c50e71ee850a2ae8c5e991c5e11d295288846864",
        f"{_SWORD}/comments/zcom/mhcc", sword_module, "henry_commentary.txt",
        "a1ee7aae65158239fe2858eebddf8e639331a837e0c68ca55788932868f54ca0",
    ),
    Source(
        "sword-comm-tdavid", "2.1-1", "bcbfad701c5c4a061475b58309cebc42755a59e87478c8355227c5e046412b3f",
        f"{_SWORD}/comments/zcom/tdavid", sword_module, "spurgeon_treasury.txt",
        "c01ea3b12d65d179bd9749b469a99e14f942799258741eb6f110e31494a15c35",
    ),
    Source(
        "r-cran-janeaustenr", "1.0.0-1", "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        "usr/lib/R/site-library/janeaustenr/data", r_vectors, "austen.txt",
        "0ad7cbf54cca3aa44afe9bc0a1f4376ca720651072716bb6301820c9c7c37eab",
    ),
)  # fmt: skip
_KERNEL = (
    Source(
        "linux-source-6.12", "6.12.117-1", "9141325315c7f1eca682113d185a8c77c82814aa6e32f7e127e61d6106403835",
        "usr/src", linux_files, "linux.txt", "97410e502e7df060479faf5b8b0c6cea6f9d8d1a2de8d649130195c93e40adec",
    ),
)  # fmt: skip
CORPORA = {"prose": _PROSE, "kernel": _KERNEL}


def package_of(source: Source, folder: Path) -> Path:
    """Returns a package's file, fetched if it is not there; the program ends where it is another than the study's."""
    path = folder / f"{source.package}_{source.version}_all.deb"
    if not path.is_file():
        words = ["apt-get", "--quiet", "download", f"{source.package}={source.version}"]
        if subprocess.run(words, cwd=folder).returncode != 0 or not path.is_file():
            sys.exit(
                f"error: {' '.join(words)} brought nothing. Debian 13 has this version; it may be put into {folder} by hand."
            )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.package_sha256:
        sys.exit(f"error: {path} is another file than the study's: SHA-256 {found}, not {source.package_sha256}")
    return path


def files_of(package: Path, folder: str) -> Files:
    """Returns the files of a folder of a package by their names."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as unpacker:
        with tarfile.open(fileobj=unpacker.stdout, mode="r|") as archive:
            inside = (m for m in archive if m.isfile() and str(Path(m.name).parent) == folder)
            return {Path(m.name).name: archive.extractfile(m).read() for m in inside}  # type: ignore[union-attr]


def make_texts(out: Path, sources: Sequence[Source]) -> None:
    """Writes OUT/txt/*.txt; the program ends where one is another than the study's."""
    for name in ("deb", "txt"):
        (out / name).mkdir(parents=True, exist_ok=True)
    if others := {path.name for path in (out / "txt").iterdir()} - {source.text for source in sources}:
        sys.exit(f"error: {out / 'txt'} has other texts, which a study would read as well: {', '.join(sorted(others))}")
    for source in sources:
        pieces = source.read(files_of(package_of(source, out / "deb"), source.folder))
        content = "".join(f"{piece.strip()}\n\n" for piece in pieces if piece.strip()).encode()
        found = hashlib.sha256(content).hexdigest()
        if found != source.text_sha256:
            sys.exit(
                f"error: {source.text} is another text than the study's: SHA-256 {found}, not {source.text_sha256}"
            )
        (out / "txt" / source.text).write_bytes(content)
        print(f"{source.text:22} {len(content):>11,} bytes, as in the study")


def test_rows(texts: Path, data: Path) -> list[str]:
    """Returns a row for each document of the test split, in its order: the first 16 digits of its SHA-256, its characters, and the
    text that it is from."""
    bodies = {
        path.name: "\n".join(path.read_text(encoding="utf-8").splitlines()) for path in sorted(texts.glob("*.txt"))
    }
    rows = []
    for document in _documents(data / "test.jsonl"):
        origin = [name for name, body in bodies.items() if document in body]
        rows.append(f"{_digest(document)}\t{len(document)}\t{','.join(origin)}")
    return rows


def check_documents(texts: Path, data: Path) -> None:
    """Ends the program where the test split is not the registered one, or another split has a document of it."""
    held_out = [line.split("\t")[0] for line in TEST_DOCUMENTS.read_text(encoding="utf-8").splitlines()[1:]]
    found = [row.split("\t")[0] for row in test_rows(texts, data)]
    if found != held_out:
        different = next(
            (i for i, (a, b) in enumerate(zip(found, held_out, strict=False)) if a != b), min(len(found), len(held_out))
        )
        sys.exit(f"error: {data / 'test.jsonl'} differs from {TEST_DOCUMENTS} in document {different + 1}; "
                 f"it has {len(found)} documents, {len(held_out)} are registered")  # fmt: skip
    for part in ("train", "valid"):
        both = set(held_out) & {_digest(document) for document in _documents(data / f"{part}.jsonl")}
        if both:
            sys.exit(
                f"error: {len(both)} documents of the test split are in {data / f'{part}.jsonl'} too: {sorted(both)[0]}"
            )
    print(
        f"{len(held_out)} documents are held out for the test, as registered; training and validation have none of them"
    )


def _documents(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line)["text"] for line in lines)


def _digest(document: str) -> str:
    return hashlib.sha256(document.encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of packages and texts")
    parser.add_argument("--corpus", choices=CORPORA, default="prose", help="which of them; prose if not given")
    parser.add_argument("--documents", type=Path, metavar="DATA", help="a study's folder data, to be compared")
    options = parser.parse_args()
    if options.documents and options.corpus != "prose":
        parser.error("--documents: the list of test documents is of the prose")
    make_texts(options.out, CORPORA[options.corpus])
    if options.documents:
        check_documents(options.out / "txt", options.documents)


if __name__ == "__main__":
    main()
