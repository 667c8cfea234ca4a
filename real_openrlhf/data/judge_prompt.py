"""Makes the judge's prompt from its parts (instruction, response, reference, rubric), by a template file.

A template is a text file in Jinja's syntax, with an optional head of JSON between two lines `---`:

    ---
    {"anchors": ["So the overall score is "], "scale": "1-5"}
    ---
    ###The instruction to evaluate:
    {{ instruction }}
    {% if reference %}

    ###Reference Answer (Score 5):
    {{ reference }}
    {% endif %}

The variables are `instruction`, `response`, `reference`, `rubric` and `context` (what was said before the
instruction). A line that holds only a tag does not appear in the prompt. The file's last newline does not count; a
template that must end in a space ends in `{{ " " }}`.

Values are inserted once and never read as template text: "{{ rubric }}" within a response stays those characters. Other
attacks by a response (chat tokens, a rubric inside it) are not handled here; see `literal` for chat tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, meta
from jinja2 import TemplateError as JinjaError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from real_openrlhf.algo.score_scale import DEFAULT_ANCHOR, ScoreScale
from real_openrlhf.common.paths import expand
from real_openrlhf.data.row import nearest, shorten
from real_openrlhf.data.template import PromptError, TemplateError

FOLDER = Path(__file__).parent / "templates"
VARIABLES = ("instruction", "response", "reference", "rubric", "context")
HEAD_KEYS = ("anchors", "scale", "system", "about")
FENCE = "---\n"


@dataclass(frozen=True, kw_only=True)
class Rubric:
    """What is judged, and what each score means: a rubric in Prometheus's form.

    criteria: a question or a phrase. descriptions: score, as the model writes it -> its description; may be empty.

    >>> print(Rubric(criteria="Is it polite?", descriptions={"1": "Rude.", "5": "Kind."}))
    [Is it polite?]
    Score 1: Rude.
    Score 5: Kind.
    """

    criteria: str
    descriptions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.criteria, str) or not self.criteria.strip():
            raise PromptError(f"a rubric needs criteria as text, not {shorten(self.criteria)}")
        for score, description in self.descriptions.items():
            if not isinstance(description, str) or not description.strip():
                raise PromptError(f"the rubric's score {score} needs a description, not {shorten(description)}")

    def __str__(self) -> str:
        lines = [f"Score {score}: {text.strip()}" for score, text in self.descriptions.items()]
        return "\n".join([f"[{self.criteria.strip()}]", *lines])


@dataclass(frozen=True, kw_only=True)
class JudgeTemplate:
    """A template that was read and checked.

    name      the file's name without its extension; with a suffix "name+suffix"
    text      the body in Jinja's syntax
    anchors   texts right before the score that the prompt asks for, or that the judge was trained to write: pass them
              as --real.anchor
    scale     the scores that the text names ("1-5"); None: it names none
    system    a system message; None: the prompt is only the user's message
    """

    name: str
    text: str
    anchors: tuple[str, ...] = (DEFAULT_ANCHOR,)
    scale: str | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        try:
            unknown = self.variables - set(VARIABLES)
        except JinjaError as error:
            line = getattr(error, "lineno", None)
            raise TemplateError(f"template {self.name}, line {line} of its text: {error}") from error
        if unknown:
            name = sorted(unknown)[0]
            raise TemplateError(
                f"template {self.name}: there is no variable {name!r}{nearest(name, list(VARIABLES))}; there are "
                f"{', '.join(VARIABLES)}"
            )

    @classmethod
    def load(cls, name_or_path: str | Path, *, suffix: str | Path | None = None) -> JudgeTemplate:
        """A template of `real_openrlhf/data/templates` by its name, or any file by its path.

        suffix: a second template (such as the one for base models), whose text is appended after a space and whose
        anchors replace the first one's. Raises TemplateError with the known names, or the fault in the file.
        """
        base = _load(name_or_path)
        if suffix is None:
            return base
        tail = _load(suffix)
        return cls(
            name=f"{base.name}+{tail.name}",
            # Not stripped: the paper's prompt ends in a space, and the authors add another.
            text=f"{base.text} {tail.text}",
            anchors=tail.anchors,
            scale=base.scale or tail.scale,
            system=base.system,
        )

    @classmethod
    def from_json(cls, content: Any) -> JudgeTemplate:
        """From the result of `asdict`, which manifests and exports hold. Raises TemplateError for anything else."""
        names = {f.name for f in fields(cls)}
        if not isinstance(content, dict) or not {"name", "text"} <= set(content) or not set(content) <= names:
            raise TemplateError(f"a template has the fields {', '.join(sorted(names))}, got {shorten(content)}")
        anchors = content.get("anchors", (DEFAULT_ANCHOR,))
        texts = [content["name"], content["text"], *([] if isinstance(anchors, str) else anchors)]
        texts += [content[key] for key in ("scale", "system") if content.get(key) is not None]
        if not all(isinstance(text, str) for text in texts) or isinstance(anchors, str):
            raise TemplateError(f"a template's fields are texts, got {shorten(content)}")
        return cls(**{**content, "anchors": tuple(anchors)})

    @property
    def sha256(self) -> str:
        """A hash of text, anchors, scale and system message; the name does not count."""
        content = {key: value for key, value in asdict(self).items() if key != "name"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def variables(self) -> frozenset[str]:
        """The variables that the text uses."""
        return _compiled(self.text)[1]

    def render(
        self,
        *,
        instruction: str | None = None,
        response: str | None = None,
        reference: str | None = None,
        rubric: Rubric | str | None = None,
        context: str | None = None,
    ) -> str:
        """The user's message, as text.

        An empty response is rendered, since models may answer nothing; other empty texts count as not given.
        Raises PromptError when the text needs a part that is not given, when a given part does not occur in the
        template (without its rubric, it would be another judgement), or when a part is not text.
        """
        parts = {
            "instruction": instruction,
            "response": response,
            "reference": reference,
            "rubric": str(rubric) if isinstance(rubric, Rubric) else rubric,
            "context": context,
        }
        values: dict[str, str | _Missing] = {}
        for name, value in parts.items():
            if value is not None and not isinstance(value, str):
                raise PromptError(f"the {name} is {type(value).__name__}, not text: {shorten(value)}")
            blank = value is None or (not value.strip() and name != "response")
            values[name] = _Missing(template=self.name, name=name) if blank else str(value)
        variables = self.variables
        unused = [name for name, value in values.items() if isinstance(value, str) and name not in variables]
        if unused:
            raise PromptError(f"template {self.name} has no place for the {', '.join(unused)}; leave it out")
        try:
            return _compiled(self.text)[0].render(values)
        except JinjaError as error:
            raise PromptError(f"template {self.name} cannot be rendered: {error}") from error

    def messages(self, **parts: Any) -> list[dict[str, str]]:
        """The same as chat messages: the system message, if there is one, and the user's."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": self.render(**parts)}]


def template_names() -> list[str]:
    """The names of the templates that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.txt"))


@dataclass(frozen=True, kw_only=True)
class _Missing:
    """A part that is not given: false in a condition, an error if its text is needed."""

    template: str
    name: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        raise PromptError(f"template {self.template} needs the {self.name}, which is not given")


# Templates may come from anywhere: in the sandbox they cannot use Python's attributes.
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=False,
)


@lru_cache(maxsize=32)
def _compiled(text: str) -> tuple[Template, frozenset[str]]:
    """The compiled template and its variables. Cached: compiling takes milliseconds, and every prompt needs it."""
    return _ENVIRONMENT.from_string(text), frozenset(meta.find_undeclared_variables(_ENVIRONMENT.parse(text)))


def _load(name_or_path: str | Path) -> JudgeTemplate:
    name = str(name_or_path)
    path = FOLDER / f"{name}.txt" if name in template_names() else Path(expand(name))
    if not path.is_file():
        known = template_names()
        raise TemplateError(
            f"there is no template {name!r}{nearest(name, known)}; known are {', '.join(known)}, or give the path of a "
            "file"
        )
    try:
        content = path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"{path}: the template cannot be read: {error}") from error
    head: dict[str, Any] = {}
    if content.startswith(FENCE):
        raw, found, content = content[len(FENCE) :].partition("\n" + FENCE)
        if not found:
            raise TemplateError(f"{path}: the head that begins with '---' has no second line '---'")
        head = _head(raw, path)
    if not content.strip():
        raise TemplateError(f"{path}: the template has no text")
    head.pop("about", None)
    return JudgeTemplate(name=path.stem, text=content, **head)


def _head(raw: str, path: Path) -> dict[str, Any]:
    try:
        head = json.loads(raw)
    except ValueError as error:
        raise TemplateError(f"{path}: the head is not JSON: {error}") from error
    if not isinstance(head, dict):
        raise TemplateError(f"{path}: the head must be a JSON object, not {shorten(head)}")
    for key in head:
        if key not in HEAD_KEYS:
            raise TemplateError(f"{path}: the head has no key {key!r}{nearest(key, list(HEAD_KEYS))}")
    if "anchors" in head:
        anchors = head["anchors"]
        if not isinstance(anchors, list) or not anchors or not all(isinstance(a, str) and a.strip() for a in anchors):
            raise TemplateError(f"{path}: anchors must be a list of texts, not {shorten(anchors)}")
        head["anchors"] = tuple(anchors)
    for key in ("scale", "system", "about"):
        if key in head and (not isinstance(head[key], str) or not head[key].strip()):
            raise TemplateError(f"{path}: {key} must be text, not {shorten(head[key])}")
    if "scale" in head:
        try:
            ScoreScale.parse(head["scale"])
        except ValueError as error:
            raise TemplateError(f"{path}: scale: {error}") from error
    return head
