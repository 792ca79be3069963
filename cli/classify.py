"""deepseek-trt classify"""

from __future__ import annotations

from pathlib import Path

import click

from deepseek_trt.cli.printing.output import output_options, print_result, say, step
from deepseek_trt.export.text.wording import some


@click.command("classify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--text", "texts", multiple=True, required=True, help="Text to label; give it as often as you like.")
@click.option(
    "--backend", type=click.Choice(["ort", "torch"]), default="ort", show_default=True, help="What runs the graph."
)
@output_options("Print one JSON object a text.")
def command(bundle: Path, texts: tuple[str, ...], backend: str, as_json: bool) -> None:
    """Print the labels of each text with their scores, best first.

    Example: deepseek-trt classify ./sentiment --text "a fine film" --text "two hours too long"
    """
    from deepseek_trt.engines.tasks.classify import TextClassifier
    from deepseek_trt.export.bundle.folder import Bundle

    step("opening the bundle", shown=False)
    classifier = TextClassifier(Bundle.open(bundle), backend)
    if classifier.session.note:
        say(f"backend: {backend} ({classifier.session.note})")
    step("computing the labels", shown=False)
    for text, result in zip(texts, classifier.classify(texts), strict=True):
        facts = {"text": text, "label": result.label, "score": result.score, "scores": dict(result.scores)}
        scores = ", ".join(f"{some([label])} {score:.4f}" for label, score in result.scores)
        print_result(as_json, facts, f"{scores}: {text}")
