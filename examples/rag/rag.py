"""Answers questions about a folder of documents, with their sources, through a server of OpenAI's API.

fewstep serve gsm-student gsm-ar
python examples/rag/rag.py --bare "How old is Mary right now?"
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import bm25s
from openai import OpenAI

HERE = Path(__file__).parent
SOURCES = "Answer from these sources and cite them as [1], [2]; say so if they do not hold the answer.\n\n"


class Documents:
    """The paragraphs of all text and Markdown files of a folder, found by their words (BM25)."""

    def __init__(self, folder: Path) -> None:
        files = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".md"))
        read = [(str(file.relative_to(folder)), file.read_text(encoding="utf-8").split("\n\n")) for file in files]
        self.passages = [(name, text.strip()) for name, texts in read for text in texts if text.strip()]
        if not self.passages:
            raise SystemExit(f"{folder} holds no .txt or .md file with text")
        self._index = bm25s.BM25()
        self._index.index(bm25s.tokenize([text for _, text in self.passages], show_progress=False), show_progress=False)

    def find(self, question: str, count: int) -> list[tuple[str, str]]:
        """The names of the files and the texts of the best passages, without those that share no word with it."""
        words = bm25s.tokenize(question, show_progress=False)
        found, scores = self._index.retrieve(words, k=min(count, len(self.passages)), show_progress=False)
        return [self.passages[i] for i, score in zip(found[0], scores[0], strict=True) if score > 0]


def prompt_of(question: str, found: list[tuple[str, str]], *, bare: bool) -> str:
    """For a chat model with instructions; bare, as the bundled models take a problem: one passage and the question."""
    if bare:
        return f"{found[0][1]} {question}"
    return SOURCES + "\n\n".join(f"[{i}] {text}" for i, (_, text) in enumerate(found, 1)) + f"\n\n{question}"


def answer(client: OpenAI, model: str, prompt: str, *, show: bool) -> float:
    """Print the answer as it grows, if `show`; its seconds from the request to the last token."""
    started_s = time.perf_counter()
    messages = [{"role": "user", "content": prompt}]
    for chunk in client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True):
        if show and chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    return time.perf_counter() - started_s


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("questions", nargs="*", help="by default the lines of questions.txt")
    options.add_argument("--documents", type=Path, default=HERE / "notes")
    options.add_argument("--models", nargs="+", default=["gsm-student"], help="with several, each is timed")
    options.add_argument("--server", default="http://127.0.0.1:8000/v1", help="its key: OPENAI_API_KEY")
    options.add_argument("--passages", type=int, default=3, help="passages that the model is given")
    options.add_argument("--bare", action="store_true", help="the best passage and the question, no instructions")
    given = options.parse_args()
    documents = Documents(given.documents)
    client = OpenAI(base_url=given.server, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    seconds: dict[str, list[float]] = {model: [] for model in given.models}
    for question in given.questions or (HERE / "questions.txt").read_text(encoding="utf-8").splitlines():
        found = documents.find(question, 1 if given.bare else given.passages)
        print(f"\n> {question}")
        for i, model in enumerate(given.models if found else []):
            seconds[model].append(answer(client, model, prompt_of(question, found, bare=given.bare), show=i == 0))
        sources = "; ".join(f"[{i}] {name}" for i, (name, _) in enumerate(found, 1))
        print("\n" + (sources or "no document has its words"))
    for model, of in seconds.items():
        print(f"{model}: median of {len(of)} answers {statistics.median(of or [0]):.3f} s")


if __name__ == "__main__":
    main()
