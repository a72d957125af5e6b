"""Sentences of English prose to train and measure correction on, with errors of ours; see docs/correction.md.

    python recipes/correction_data.py sentences runs/correction-data     # fetches documentation packages of Debian 12
    python recipes/correction_data.py problems runs/correction-data      # tokenizer, and files for `fewstep eval`
    python recipes/correction_data.py rows runs/correction-data rows.jsonl --copies 2      # rows to train on

The first needs a Debian system and its package server, the others need neither.
"""

from run_recipe import run_recipe  # isort: skip  (before what takes long to import)

import os
import re
import struct
import subprocess
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from multiprocessing import Pool
from operator import call
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedTokenizerBase

from fewstep.errors import FewstepError
from fewstep.json_files import write_json_whole, write_rows_whole
from fewstep.models.fresh import fresh_tokenizer
from fewstep.models.load import load_tokenizer
from fewstep.models.names import BUNDLED
from fewstep.tasks.prose import Document, SentenceFolder, Split, html_paragraphs
from fewstep.tasks.text_errors import TextErrors
from fewstep.train.token_tables import Rows

SOURCES = {
    "python3.11-doc": "PSF-2.0", "sqlite3-doc": "public domain", "postgresql-doc-15": "PostgreSQL",
    "apache2-doc": "Apache-2.0", "erlang-doc": "Apache-2.0", "nodejs-doc": "MIT", "rust-doc": "MIT or Apache-2.0",
    "cmake-doc": "BSD-3-Clause", "ghc-doc": "BSD-3-Clause", "golang-1.19-doc": "BSD-3-Clause", "libx11-doc": "MIT",
    "libboost1.74-doc": "BSL-1.0", "llvm-14-doc": "Apache-2.0 with LLVM exception",
    "clang-14-doc": "Apache-2.0 with LLVM exception", "tomcat10-docs": "Apache-2.0", "twisted-doc": "MIT",
    "cinder-doc": "Apache-2.0", "glance-doc": "Apache-2.0", "heat-doc": "Apache-2.0", "ironic-doc": "Apache-2.0",
    "keystone-doc": "Apache-2.0", "manila-doc": "Apache-2.0", "neutron-doc": "Apache-2.0", "nova-doc": "Apache-2.0",
    "octavia-doc": "Apache-2.0", "python-astropy-doc": "BSD-3-Clause", "python-dask-doc": "BSD-3-Clause",
    "python-django-doc": "BSD-3-Clause", "python-djangorestframework-doc": "BSD-2-Clause",
    "python-flask-doc": "BSD-3-Clause", "python-ipython-doc": "BSD-3-Clause", "python-pandas-doc": "BSD-3-Clause",
    "python-pytest-doc": "MIT", "python-scipy-doc": "BSD-3-Clause", "python-sklearn-doc": "BSD-3-Clause",
    "python-sqlalchemy-doc": "MIT", "python-sympy-doc": "BSD-3-Clause", "python-tables-doc": "BSD-3-Clause",
    "r-cran-janeaustenr": "MIT; the novels are in the public domain",
}  # fmt: skip
"""Package -> licence of its text, as its copyright file says. All permit use, change and redistribution by anybody."""

UNSEEN = ("python-flask-doc", "tomcat10-docs", "r-cran-janeaustenr/3")
"""Beginnings of the names of documents that are kept for the part `unseen`; the last is the novel Persuasion."""

SPLIT = Split(unseen=UNSEEN)

MOST_BYTES = 5_000_000
"""Of a page: longer ones are lists of names."""

VOCAB_SIZE = 4096
MOST_TOKENS = 60
PROBLEM_SEED, FIRST_SEED = 1, 100  # of the errors of problems, and of the first copy to train on; 0 is the tokenizer's
ROWS_PER_PART = 50_000

_NO_PAGES = re.compile(r"/(core|std)/arch/|/rust-doc/html/src/")
"""Hundreds of instructions of processors in the same words, and source code."""

app = typer.Typer(pretty_exceptions_enable=False)
Folder = Annotated[Path, typer.Argument(help="folder for everything that this recipe makes")]
Workers = Annotated[int, typer.Option(help="processes", min=1)]


# --- sentences ---


def pages(folder: Path, package: str) -> Iterator[Document]:
    """The HTML pages of an unpacked package."""
    for place, _, names in sorted(os.walk(folder)):  # does not follow links, by which pages would come twice
        for name in sorted(names):
            path = Path(place, name)
            if path.suffix == ".html" and not _NO_PAGES.search(str(path)) and not path.is_symlink():
                if path.stat().st_size > MOST_BYTES:
                    continue
                page = path.read_text(encoding="utf-8", errors="replace")
                yield Document(f"{package}/{path.relative_to(folder)}", html_paragraphs(page))


def novels(folder: Path, package: str) -> Iterator[Document]:
    """The novels in a data file of R: compressed lists of lines. A chapter is a document."""
    (file,) = folder.rglob("Rdata.rdb")
    data = file.read_bytes()
    novel = 0
    while data:
        chunk = zlib.decompressobj()
        content = chunk.decompress(data[4:])  # behind its length
        data = chunk.unused_data
        text = "\n".join(_texts_of_r(content))
        for number, chapter in enumerate(re.split(r"\n(?=chapter )", text, flags=re.IGNORECASE)):
            yield Document(f"{package}/{novel}/{number}", re.split(r"\n\s*\n", chapter))
        novel += 1


def _texts_of_r(content: bytes) -> Iterator[str]:
    """The texts in R's serialisation, which writes each as a flag, its length and its bytes."""
    flag, place = b"\x00\x04\x00\x09", 0
    while (place := content.find(flag, place)) >= 0:
        (length,) = struct.unpack(">I", content[place + 4 : place + 8])
        yield content[place + 8 : place + 8 + length].decode("utf-8", errors="replace")
        place += 8 + length


def documents(package: str) -> list[tuple[str, list[str]]]:
    """Name and sentences of each document of a package, which is fetched and unpacked for this."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            subprocess.run(["apt-get", "download", "-q", package], cwd=temporary, check=True, capture_output=True)
            (archive,) = Path(temporary).glob("*.deb")
            subprocess.run(["dpkg-deb", "-x", archive, "files"], cwd=temporary, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", b"") or b""
            raise FewstepError(f"could not fetch {package}: {said.decode(errors='replace').strip() or error}") from None
        read = novels if package == "r-cran-janeaustenr" else pages
        found = read(Path(temporary, "files"), package)
        return [(one.name, list(one.sentences())) for one in found]


@app.command()
def sentences(folder: Folder, workers: Workers = 2, package: list[str] = list(SOURCES)) -> None:  # noqa: B006
    """Gather the sentences of all packages, and write those of each part with their documents."""
    with Pool(workers) as pool:
        figures = SentenceFolder(folder).write(chain.from_iterable(pool.imap(documents, package)), SPLIT)
    table = {name: {"licence": SOURCES[name], **figures.get(name, {})} for name in package}
    write_json_whole(folder / "sources.json", table)
    total = sum(figures.values(), Counter[str]())
    print(", ".join(f"{name}: {count:,}" for name, count in total.items()))


# --- tokenizer, problems and rows ---


@app.command()
def problems(
    folder: Folder,
    count: Annotated[int, typer.Option(help="of each part", min=1)] = 2_000,
    vocab_size: int = VOCAB_SIZE,
) -> None:
    """Train the tokenizer, and write problems of the parts dev, test and unseen for the task `correction`."""
    gathered = SentenceFolder(folder)
    clean = gathered.read("train")
    # What people type is in the texts too: half of the sentences with errors, so that broken words are not all bytes.
    texts = chain(clean, (TextErrors().mistype(text, 0).text for text in clean[::2]))
    tokenizer = fresh_tokenizer(texts, vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    for part in ("dev", "test", "unseen"):
        of_part = gathered.read(part)
        chosen = of_part[:: max(1, len(of_part) // (2 * count))]
        found = list(_problems(chosen, tokenizer, part))[:count]
        write_rows_whole(folder / f"{part}-problems.jsonl", found)
        print(f"{part}: {len(found)} problems")


@app.command()
def sample(folder: Folder, each: Annotated[int, typer.Option(help="sentences of each source", min=1)] = 150) -> None:
    """Write the problems that ship with the package: text in the public domain, of documents not trained on."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    found = []
    for source, part, beginning in (("sqlite", "test", "sqlite3-doc/"), ("persuasion", "unseen", UNSEEN[-1])):
        asked = list(_problems(SentenceFolder(folder).read(part, documents=beginning), tokenizer, source))
        found += asked[:: max(1, len(asked) // each)][:each]
    write_rows_whole(BUNDLED / "correction-problems" / "test.jsonl", found)


def _problems(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, name: str) -> Iterator[dict[str, str]]:
    """Those that are short enough, with errors."""
    for number, row in enumerate(TextErrors().rows(texts, PROBLEM_SEED)):
        if max(map(len, tokenizer(list(row.values()))["input_ids"])) <= MOST_TOKENS:
            yield {"id": f"{name}-{number:05d}", "question": row["prompt"], "answer": row["completion"]}


def rows_in_parts(clean: list[str], copies: int) -> dict[str, Rows]:
    """What makes the rows of each part of each copy, by a name; sentence and copy decide the errors."""
    parts = [clean[i : i + ROWS_PER_PART] for i in range(0, len(clean), ROWS_PER_PART)]
    return {
        f"{copy:02d}-{i:03d}": partial(TextErrors().rows, part, FIRST_SEED + copy)
        for copy in range(copies)
        for i, part in enumerate(parts)
    }


@app.command()
def rows(
    folder: Folder,
    output: Annotated[Path, typer.Argument(help="JSONL file for the rows")],
    copies: Annotated[int, typer.Option(help="times that each sentence comes, with other errors", min=1)] = 1,
    part: str = "train",
    limit: Annotated[int | None, typer.Option(help="of the sentences, the first of an even spread")] = None,
    workers: Workers = 2,
) -> None:
    """Write rows {"prompt", "completion"} for the commands of `fewstep train`."""
    clean = SentenceFolder(folder).read(part)
    if limit is not None:
        clean = clean[:: max(1, len(clean) // limit)][:limit]
    with Pool(workers) as pool:
        write_rows_whole(output, chain.from_iterable(pool.imap(call, rows_in_parts(clean, copies).values())))
    print(f"{output}: {copies * len(clean):,} rows")


if __name__ == "__main__":
    run_recipe(app)
