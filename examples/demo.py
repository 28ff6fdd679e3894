"""The main job, for real: summarize fables, find their morals, compare titles, merge it all.

Everything runs on this machine: a small language model behind a llama.cpp server on loopback, asked
through the official OpenAI SDK. `nox -s demo` installs what is needed and runs this.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any

from local_model import local_model

import feste
from feste.backend import Limits
from feste.backend.openai import ChatParams, CompleteParams, OpenAI
from feste.prompt import ChatPrompt, Prompt

HERE = Path(__file__).parent

summarize = ChatPrompt(
    system="You answer with one short sentence.",
    user="What happens in this fable?\n\n{{ text }}",
)
moral = Prompt("Fable: {{ summary }}\nThe moral of this fable in a few words:")
merge = ChatPrompt(
    system="You write clear, simple English.",
    user="Here are summaries of fables:\n"
    "{% for s in summaries %}- {{ s }}\n{% endfor %}"
    "Write two sentences about what they have in common.",
)


@feste.task(pure=True)
def first_sentence(text: str) -> str:
    """A Python tool between two calls: keep the first sentence of an answer."""
    return re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0]


@feste.task(pure=True)
def most_alike(titles: list[str], vectors: list[Any]) -> str:
    """Another one: which two fables have the nearest summaries?"""

    def cosine(a: Any, b: Any) -> float:
        return sum(x * y for x, y in zip(a, b)) / (math.hypot(*a) * math.hypot(*b))

    pairs = [
        (cosine(vectors[i], vectors[j]), titles[i], titles[j])
        for i in range(len(titles))
        for j in range(i)
    ]
    score, one, other = max(pairs)
    return f"{one} / {other} ({score:.2f})"


@feste.task(pure=True)
def book(**parts: Any) -> dict[str, Any]:
    """The last one binds everything together."""
    return parts


def build(llm: OpenAI, fables: list[str]) -> feste.FesteDelayed[dict[str, Any]]:
    """Write the job down as ordinary calls. Nothing runs here: each call becomes a node."""
    short = ChatParams(max_tokens=40, temperature=0)
    titles = [fable.splitlines()[0] for fable in fables]
    texts = [fable.split("\n", 1)[1] for fable in fables]
    summaries = [first_sentence(llm.chat(summarize(text=t), short)) for t in texts]
    morals = [
        llm.complete(moral(summary=s), CompleteParams(max_tokens=14, temperature=0, stop=["\n"]))
        for s in summaries
    ]
    vectors = [llm.embed(title) for title in titles]
    return book(
        summaries=dict(zip(titles, summaries)),
        morals=dict(zip(titles, morals)),
        most_alike=most_alike(titles, vectors),
        together=llm.chat(merge(summaries=summaries), ChatParams(max_tokens=80, temperature=0)),
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--smoke", action="store_true", help="only three fables")
    options.add_argument("--out", type=Path, default=Path("feste-demo"), help="for the pictures")
    arguments = options.parse_args()
    fables = (HERE / "fables.txt").read_text(encoding="utf-8").strip().split("\n\n")
    if arguments.smoke:
        fables = fables[:3]

    print("Starting a real language model on loopback ...", flush=True)
    with local_model() as (base_url, model):
        llm = OpenAI(model, base_url=base_url, limits=Limits(concurrency=8))
        job = build(llm, fables)

        print("\nThe plan; nothing has been sent yet:\n")
        print(feste.explain(job))
        arguments.out.mkdir(parents=True, exist_ok=True)
        job.visualize(arguments.out / "graph.svg")

        print("\nRunning it ...", flush=True)
        answers = job.compute(progress=True)

    for title, summary in answers["summaries"].items():
        print(f"\n{title}\n  {summary}\n  moral: {answers['morals'][title].strip()}")
    print(f"\nMost alike by their titles: {answers['most_alike']}")
    print(f"\nTogether: {answers['together'].strip()}\n")

    report = feste.last_report()
    assert report is not None
    print(report)
    report.save(arguments.out / "timeline.svg")
    report.save(arguments.out / "report.json")
    print(f"\nPictures of the graph and of the run are in {arguments.out}/")


if __name__ == "__main__":
    main()
