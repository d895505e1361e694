"""The form of the files in a run folder, as far as the report and a resumed run rely on it; all else in them is free."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from meadow.arrays.files import DamagedFile, read_json

Whole = Annotated[int, Field(ge=0, lt=2**53)]
Number = float | None
Scores = dict[str, dict[str, Number]]
"""target -> metric -> value."""
Texts = dict[str, str]


class Form(BaseModel):
    """A JSON object with these entries and any others."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Spread(Form):
    """A metric over the clients."""

    mean: Number


Spreads = dict[str, dict[str, Spread]]


class Validation(Form):
    """Scores on validation parts."""

    clients: Spreads = {}
    global_: Scores = Field({}, alias="global")


class Failure(Form):
    """A client that failed in a round."""

    client: Whole
    reason: str


class Record(Form):
    """A line of rounds.jsonl."""

    round: Annotated[int, Field(ge=1, lt=2**53)]
    cohort: list[Whole] = []
    failed: list[Failure] = []
    seconds: Number = None
    bytes_up: Number = None
    bytes_down: Number = None
    global_: Scores | None = Field(None, alias="global")
    clients: Spreads | None = None
    validation: Validation | None = None
    clients_round: Whole = 0
    void: list[Any] = []


class _Last10(Form):
    global_: Scores | None = Field(None, alias="global")
    clients: Spreads | None = None


class _Metrics(_Last10):
    validation: Validation | None = None
    last10: _Last10 | None = None


class _Selected(Form):
    kept_round: Whole


class _Release(Form):
    what: str
    mechanism: str


class _Epsilon(Form):
    max: Number
    median: Number


class _Privacy(Form):
    unit: str
    releases: list[_Release] = []
    epsilon: _Epsilon | None = None
    statement: str = ""


class _Engine(Form):
    training: dict[str, Whole] = {}
    passed_over: dict[str, dict[str, Whole]] = {}


class Summary(Form):
    """summary.json."""

    name: str
    status: Literal["done", "stopped", "failed"]
    reason: str
    rounds: Whole
    model_sha256: str
    personal_sha256: str
    split_sha256: str
    metrics: _Metrics
    cost: dict[str, Number]
    clients: dict[str, Whole]
    privacy: _Privacy
    engine: _Engine = _Engine()
    forgetting: dict[str, dict[str, dict[str, Number]]] = {}
    selected: _Selected | None = None


class Manifest(Form):
    """manifest.json."""

    created: str = ""
    versions: Texts = {}
    command: list[str] = []
    split: dict[str, Any] = {}


class Split(Form):
    """split.json: `sizes` of each client's parts, and `labels`, each client's samples of each label."""

    sizes: list[Annotated[list[Whole], Field(min_length=3, max_length=3)]] = []
    labels: list[list[Whole]] = []

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        if self.labels and (len(self.labels) != len(self.sizes) or len(set(map(len, self.labels))) > 1):
            raise ValueError("labels has not one row of the same length for each client of sizes")
        return self


class _Curve(Form):
    false_positive: list[float]
    true_positive: list[float]
    auroc: Number


class _Evaluation(Form):
    classes: list[str] = []
    confusion: list[list[Whole]] = Field([], min_length=1)
    roc: dict[str, _Curve] = {}

    @model_validator(mode="after")
    def _square(self) -> Self:
        if {len(self.confusion), *map(len, self.confusion)} - {0, len(self.classes)}:
            raise ValueError("confusion has not one row and column for each of the classes")
        return self


class Evaluation(Form):
    """evaluation.json."""

    global_: dict[str, _Evaluation] | None = Field(None, alias="global")
    clients: dict[str, _Evaluation] | None = None


def fault(form: type[Form], value: object) -> str:
    """What is wrong with a value from JSON, "" if it has the form."""
    try:
        TypeAdapter(form).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg'].lower()}"
    return ""


def read_recorded(path: Path, form: type[Form]) -> dict[str, Any]:
    """Read a JSON file of this form. Raises DamagedFile if it is missing or has another one."""
    found = read_json(path, dict)
    if why := fault(form, found):
        raise DamagedFile(f"{path}: {why}")
    return found
