"""Sentences of English prose to train and measure correction on, with errors of ours; see docs/correction.md.

    python recipes/correction_data.py sentences runs/correction-data     # fetches documentation packages of Debian 12
    python recipes/correction_data.py problems runs/correction-data      # tokenizer, and files for `fewstep eval`
    python recipes/correction_data.py rows runs/correction-data rows.jsonl --copies 2      # rows to train on

The first needs a Debian system and its package server, the others need neither.
"""

from run_recipe import run_recipe  # isort: skip  (before what takes long to import)

import gzip
import hashlib
import html
import json
import os
import re
import struct
import subprocess
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from multiprocessing import Pool
from pathlib import Path
from typing import Annotated

import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fewstep.errors import FewstepError
from fewstep.files import write_whole
from fewstep.json_files import write_json_whole, write_rows_whole
from fewstep.models.load import load_tokenizer
from fewstep.models.names import BUNDLED
from fewstep.models.sentences import plain_word, sentence_ends, straight_quotes
from fewstep.tasks.text_errors import TextErrors

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

SHARES = {"test": 0.03, "dev": 0.01}
"""Of the documents of all other packages; the rest is for training."""

LEAST_WORDS, MOST_WORDS, MOST_CHARACTERS = 5, 45, 300
LEAST_PLAIN = 0.8
MOST_BYTES = 5_000_000
"""Of a page: longer ones are lists of names."""

SPECIAL_TOKENS = ("<pad>", "<eos>", "<mask>", "<bos>", "<answer>")  # ids 0 to 4
VOCAB_SIZE = 4096
MOST_TOKENS = 60

_NO_PAGES = re.compile(r"/(core|std)/arch/|/rust-doc/html/src/")
"""Hundreds of instructions of processors in the same words, and source code."""

_BLOCK = r"p|div|h[1-6]|ul|ol|li|table|tr|td|th|pre|dl|dd|dt|blockquote|section|article|nav|body|header|footer|form|hr"
_PARAGRAPH = re.compile(rf"<(?:p|li|dd)\b[^>]*>(.*?)(?=</?(?:{_BLOCK})\b)", re.DOTALL | re.IGNORECASE)
_NO_PROSE = re.compile(r"<(script|style|pre|nav)\b.*?</\1>", re.DOTALL | re.IGNORECASE)
_LINE_BREAK = re.compile(r"<br\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"<[^>]*>")
_WHOLE = re.compile(r"[A-Z\"'(].*[.!?][\"')]*")
_UNREAD = str.maketrans({"\u00ad": "", "¶": ""})
"""Soft hyphens, and the marks of links to headings."""
_ENGLISH = frozenset("the of to and in is a that for it as be this by with or on are an not if you was at from".split())

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<bos>' + message['content'] + '<answer>' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ message['content'] + '<eos>' }}"
    "{%- else -%}{{ raise_exception('Only the roles user and assistant are known.') }}{%- endif -%}"
    "{%- endfor -%}"
)

app = typer.Typer(pretty_exceptions_enable=False)
Folder = Annotated[Path, typer.Argument(help="folder for everything that this recipe makes")]
Workers = Annotated[int, typer.Option(help="processes", min=1)]


# --- sentences ---


@dataclass(frozen=True)
class Document:
    """A page of documentation or a chapter; `name` begins with that of its package."""

    name: str
    paragraphs: list[str]

    @property
    def part(self) -> str:
        """The part to which all its sentences belong: by its name, so that it never changes."""
        if self.name.startswith(UNSEEN):
            return "unseen"
        place = int(hashlib.sha256(self.name.encode()).hexdigest()[:8], 16) / (1 << 32)
        for part, share in SHARES.items():
            if place < share:
                return part
            place -= share
        return "train"

    def sentences(self) -> Iterator[str]:
        """The clean ones: whole English sentences of few names and marks."""
        for paragraph in self.paragraphs:
            words, start = straight_quotes(paragraph.translate(_UNREAD)).split(), 0
            for end in sentence_ends(words):
                if is_clean(words[start:end]):
                    yield " ".join(words[start:end])
                start = end


def is_clean(words: list[str]) -> bool:
    """Whether this is a whole sentence of English prose, of a length that the model is for."""
    text = " ".join(words)
    return (
        LEAST_WORDS <= len(words) <= MOST_WORDS
        and len(text) <= MOST_CHARACTERS
        and _WHOLE.fullmatch(text) is not None
        and all(character < "\u0250" or character in "–—…" for character in text)
        and sum(plain_word(word) is not None for word in words) >= LEAST_PLAIN * len(words)
        and any(word.lower() in _ENGLISH for word in words)
    )


def pages(folder: Path, package: str) -> Iterator[Document]:
    """The HTML pages of an unpacked package."""
    for place, _, names in sorted(os.walk(folder)):  # does not follow links, by which pages would come twice
        for name in sorted(names):
            path = Path(place, name)
            if path.suffix == ".html" and not _NO_PAGES.search(str(path)) and not path.is_symlink():
                if path.stat().st_size > MOST_BYTES:
                    continue
                page = _NO_PROSE.sub(" ", path.read_text(encoding="utf-8", errors="replace"))
                found = (_TAG.sub("", _LINE_BREAK.sub(" ", match[1])) for match in _PARAGRAPH.finditer(page))
                yield Document(f"{package}/{path.relative_to(folder)}", list(map(html.unescape, found)))


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


def documents(package: str) -> list[tuple[str, str, str]]:
    """Document, part and text of each sentence of a package, which is fetched and unpacked for this."""
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
        return [(one.name, one.part, sentence) for one in found for sentence in one.sentences()]


def sentences_file(folder: Path, part: str) -> Path:
    return folder / f"{part}.jsonl.gz"


def _rows(folder: Path, part: str) -> list[dict[str, str]]:
    """FewstepError if they have not been gathered."""
    path = sentences_file(folder, part)
    if not path.exists():
        raise FewstepError(f"{path} is not there; gather it with: correction_data.py sentences {folder}")
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def read_sentences(folder: Path, part: str) -> list[str]:
    """The texts of a part. FewstepError if they have not been gathered."""
    return [row["text"] for row in _rows(folder, part)]


@app.command()
def sentences(folder: Folder, workers: Workers = 2, package: list[str] = list(SOURCES)) -> None:  # noqa: B006
    """Gather the sentences of all packages, and write those of each part with their documents."""
    folder.mkdir(parents=True, exist_ok=True)
    # The parts that measure come first: a sentence that is in one of them is in no other, also with other numbers.
    rows: dict[str, list[dict[str, str]]] = {"unseen": [], "test": [], "dev": [], "train": []}
    with Pool(workers) as pool:
        for found in pool.imap(documents, package):
            for document, part, text in found:
                rows[part].append({"document": document, "text": text})
    known: set[str] = set()
    figures: dict[str, Counter[str]] = {name: Counter() for name in package}
    for part, of_part in rows.items():
        with (
            write_whole(sentences_file(folder, part)) as temporary,
            gzip.open(temporary, "wt", encoding="utf-8") as out,
        ):
            for row in of_part:
                key = re.sub(r"\d+", "0", row["text"].lower())
                if key not in known:
                    known.add(key)
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
                    of_source = figures[row["document"].split("/")[0]]
                    of_source[part] += 1
                    of_source["bytes"] += len(row["text"].encode())
    table = {name: {"licence": SOURCES[name], **of_source} for name, of_source in figures.items()}
    write_json_whole(folder / "sources.json", table)
    total = Counter[str]()
    for of_source in figures.values():
        total.update(of_source)
    print(", ".join(f"{name}: {count:,}" for name, count in total.items()))


# --- tokenizer ---


def build_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Byte-level BPE for English prose, in which every text comes back exactly; ids 0 to 4 are SPECIAL_TOKENS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, eos, mask, bos, _ = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, mask_token=mask, bos_token=bos,
        additional_special_tokens=["<answer>"], chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


# --- problems and rows ---


@app.command()
def problems(
    folder: Folder,
    count: Annotated[int, typer.Option(help="of each part", min=1)] = 2_000,
    vocab_size: int = VOCAB_SIZE,
) -> None:
    """Train the tokenizer, and write problems of the parts dev, test and unseen for the task `correction`."""
    clean = read_sentences(folder, "train")
    # What people type is in the texts too: half of the sentences with errors, so that broken words are not all bytes.
    texts = chain(clean, (TextErrors().mistype(text, 0).text for text in clean[::2]))
    tokenizer = build_tokenizer(texts, vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    for part in ("dev", "test", "unseen"):
        of_part = read_sentences(folder, part)
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
        texts = [row["text"] for row in _rows(folder, part) if row["document"].startswith(beginning)]
        asked = list(_problems(texts, tokenizer, source))
        found += asked[:: max(1, len(asked) // each)][:each]
    write_rows_whole(BUNDLED / "correction-problems" / "test.jsonl", found)


def _problems(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, name: str) -> Iterator[dict[str, str]]:
    """Those that are short enough, with errors."""
    for number, text in enumerate(texts):
        mistyped = TextErrors().mistype(text, seed=1)
        if max(map(len, tokenizer([mistyped.text, text])["input_ids"])) <= MOST_TOKENS:
            yield {"id": f"{name}-{number:05d}", "question": mistyped.text, "answer": text}


def _rows_of(task: tuple[list[str], int]) -> list[dict[str, str]]:
    texts, seed = task
    return [{"prompt": TextErrors().mistype(text, seed).text, "completion": text} for text in texts]


@app.command()
def rows(
    folder: Folder,
    output: Annotated[Path, typer.Argument(help="JSONL file for the rows")],
    copies: Annotated[int, typer.Option(help="times that each sentence comes, with other errors", min=1)] = 1,
    part: str = "train",
    limit: Annotated[int | None, typer.Option(help="of the sentences, the first of an even spread")] = None,
    workers: Workers = 2,
) -> None:
    """Write rows {"prompt", "completion"} for the commands of `fewstep train`; sentence and copy decide the errors."""
    clean = read_sentences(folder, part)
    if limit is not None:
        clean = clean[:: max(1, len(clean) // limit)][:limit]
    chunks = [clean[i : i + 10_000] for i in range(0, len(clean), 10_000)]
    tasks = [(chunk, 100 + copy) for copy in range(copies) for chunk in chunks]  # 0 and 1 are those of `problems`
    with Pool(min(workers, len(tasks))) as pool:
        write_rows_whole(output, chain.from_iterable(pool.imap(_rows_of, tasks)))
    print(f"{output}: {copies * len(clean):,} rows")


if __name__ == "__main__":
    run_recipe(app)
