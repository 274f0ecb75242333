"""The validation of a data set as one page of HTML, which needs no other file, no script and no network."""

from adaptfleet.core.data.validation import Validation, statistics
from adaptfleet.core.reports.charts import histogram
from adaptfleet.core.reports.page import Section, charts, folded, table, tiles
from adaptfleet.core.reports.page import page as html_page


def page(validation: Validation, contract: str) -> str:
    verdict = "It can be trained on." if validation.is_trainable else "It cannot be trained on as it is."
    errors = [finding for finding in validation.findings if finding.is_fatal]
    notes = [finding for finding in validation.findings if not finding.is_fatal]
    lengths = [histogram(f"lengths of rows, {side.name}", side.lengths, "tokens") for side in validation.sides]
    labels = [histogram(f"tokens that count in the loss, {side.name}", side.labels, "tokens of a row") for side in validation.sides]
    head = [(side.name, f"{len(side.lengths):,} rows") for side in validation.sides]
    sections = [
        Section("Errors", "".join(folded(finding.title, "\n".join(finding.lines)) for finding in errors)),
        Section("Notes", "".join(folded(finding.title, "\n".join(finding.lines)) for finding in notes)),
        Section("Sizes", table(("", *(side.name for side in validation.sides)), statistics(validation)) + charts([*lengths, *labels])),
    ]
    counts = [("kinds of error", str(len(errors))), ("kinds of note", str(len(notes)))]
    return html_page(f"Data of {contract}", f"{', '.join(validation.sources)}. {verdict}", tiles([*head, *counts]), sections)
