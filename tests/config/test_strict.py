"""strict_object: what is accepted, what is refused and with which words; to_plain is its inverse."""

from __future__ import annotations

import abc
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from omegaconf import OmegaConf

from moesaic.config.strict import ConfigError, strict_object, to_plain

HERE = __name__


class Shape(abc.ABC):
    """The base of a family of components."""

    @abc.abstractmethod
    def area(self) -> float: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Circle(Shape):
    radius: float

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise ValueError(f"radius={self.radius} is not positive (allowed: above 0). Give a size.")

    def area(self) -> float:
        return 3 * self.radius**2


@dataclass(frozen=True, kw_only=True, slots=True)
class Square(Shape):
    side: float = 1.0
    style: Literal["plain", "rounded"] = "plain"

    def area(self) -> float:
        return self.side**2


@dataclass(frozen=True, kw_only=True, slots=True)
class Pen:
    width: int = 1
    colour: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stranger:
    radius: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    name: str
    shape: Shape
    pen: Pen = field(default_factory=Pen)
    others: tuple[Shape, ...] = ()
    named: dict[str, Shape] = field(default_factory=dict)
    spare: Shape | None = None
    points: list[list[float]] = field(default_factory=list)
    corner: tuple[int, str] = (0, "a")
    folder: Path | None = None
    budget: int | float | Literal["all"] = "all"
    steps: Sequence[int] = ()
    notes: Any = None
    bold: bool = False

    def __post_init__(self) -> None:
        if self.pen.width > 9:
            raise ValueError("pen.width is above 9")


def circle(radius: object = 2) -> dict[str, object]:
    return {"_target_": f"{HERE}.Circle", "radius": radius}


def drawing(**changes: object) -> Drawing:
    return strict_object(Drawing, {"name": "d", "shape": circle(), **changes}, "art")


def test_a_whole_tree_becomes_objects() -> None:
    made = drawing(
        pen={"width": 3, "colour": "red"},
        others=[circle(1), {"_target_": f"{HERE}.Square"}],
        named={"a": {"_target_": f"{HERE}.Square", "side": 4}},
        spare=circle(3),
        points=[[1, 2.5], []],
        corner=[7, "b"],
        folder="some/where",
        budget=3,
        steps=[1, 2],
        notes={"free": [1, {"x": None}]},
    )
    assert made.pen == Pen(width=3, colour="red")
    assert made.others == (Circle(radius=1.0), Square())
    assert made.named == {"a": Square(side=4.0)}
    assert made.spare == Circle(radius=3.0)
    assert made.points == [[1.0, 2.5], []]
    assert made.corner == (7, "b")
    assert made.folder == Path("some/where")
    assert made.steps == (1, 2)
    assert made.notes == {"free": [1, {"x": None}]}


@pytest.mark.parametrize(("given", "kind"), [(3, int), (0.5, float), ("all", str)])
def test_a_union_keeps_the_type_that_was_given(given: object, kind: type) -> None:
    assert type(drawing(budget=given).budget) is kind


def test_an_int_becomes_a_float_where_a_float_is_wanted() -> None:
    made = drawing(shape=circle(1))
    assert isinstance(made.shape, Circle)
    assert type(made.shape.radius) is float


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pen": {"widht": 3}}, r"unknown key art\.pen\.widht; did you mean 'width'\? Keys of Pen: colour, width\."),
        ({"zzz": 1}, r"unknown key art\.zzz\. Keys of Drawing: bold, budget"),
        (
            {"shape": {"_target_": f"{HERE}.Circle"}},
            r"art\.shape\.radius is required by Circle .*: set art\.shape\.radius=\.\.\.",
        ),
        ({"shape": circle("???")}, r"art\.shape\.radius is required"),
        ({"pen": {"width": "???"}}, r"art\.pen\.width is required"),
        ({"pen": {"width": "3"}}, r"art\.pen\.width='3' is text, but an integer is wanted: take the quotes away"),
        ({"pen": {"width": 3.0}}, r"art\.pen\.width=3\.0 is a number with a fraction, .*: write 3$"),
        ({"pen": {"width": True}}, r"art\.pen\.width=True is true/false, but an integer is wanted"),
        ({"pen": {"width": None}}, r"art\.pen\.width=None is null, but an integer"),
        ({"pen": 3}, r"art\.pen=3 is an integer, but the keys of Pen are wanted here"),
        ({"name": 5}, r"art\.name=5 is an integer, but text is wanted: write '5' in quotes"),
        ({"bold": "yes"}, r"art\.bold='yes' is text, but true or false is wanted"),
        ({"bold": 1}, r"art\.bold=1 is an integer, but true or false"),
        ({"shape": circle(float("nan"))}, r"art\.shape\.radius=nan is not a finite number"),
        ({"shape": circle(float("inf"))}, r"art\.shape\.radius=inf is not a finite number"),
        ({"notes": {"deep": [1.0, float("nan")]}}, r"art\.notes\.deep\[1\]=nan is not a finite"),
        ({"shape": circle(-1)}, r"^art\.shape\.radius=-1\.0 is not positive"),
        ({"pen": {"width": 10}}, r"^art\.pen\.width is above 9"),
        ({"others": [circle(), circle("x")]}, r"art\.others\[1\]\.radius='x'"),
        ({"named": {"a": circle("x")}}, r"art\.named\.a\.radius='x'"),
        ({"spare": circle("x")}, r"art\.spare\.radius='x'"),
        ({"spare": 3}, r"art\.spare=3 fits none of: Shape, null"),
        ({"others": circle()}, r"art\.others=.* but a list is wanted"),
        ({"named": [1]}, r"art\.named=\[1\] is a list, but keys and values are wanted"),
        ({"named": {1: circle()}}, r"key of art\.named=1 is an integer, but text"),
        ({"corner": [1]}, r"art\.corner has 1 items, but 2 are wanted"),
        ({"points": [[1], ["a"]]}, r"art\.points\[1\]\[0\]='a'"),
        ({"budget": "al"}, r"art\.budget='al' .*did you mean 'all'\?"),
        (
            {"shape": {"_target_": f"{HERE}.Square", "style": "roundd"}},
            r"art\.shape\.style='roundd' is not allowed; did you mean 'rounded'\? Allowed: plain, rounded\.",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        drawing(**changes)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("Circle", rf"'Circle' is no 'package\.module\.Class'; did you mean '{HERE}\.Circle'\?"),
        (3, r"=3 is no 'package"),
        (f"{HERE}.Cirlce", r"has no class 'Cirlce'; did you mean 'Circle'\? Shape classes there: Circle, Square\."),
        (f"{HERE}.circle", r"has no class 'circle'; did you mean 'Circle'\?"),
        (f"{HERE}.Stranger", r"is no Shape, which is wanted here.* Known Shape classes: "),
        (f"{HERE}.Shape", r"is no Shape|is abstract"),
        (
            "moesaic.config.strct.Circle",
            r"no module named 'moesaic\.config\.strct'; did you mean 'moesaic\.config\.strict'\?",
        ),
        ("no_such_package.Circle", r"no module named 'no_such_package'"),
    ],
)
def test_a_wrong_target_is_refused(target: object, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^art\.shape\._target_.*({message})"):
        drawing(shape={"_target_": target})


def test_a_base_class_without_a_target_lists_what_is_known() -> None:
    with pytest.raises(ConfigError, match=r"art\.shape\._target_ is missing: name the kind of Shape.*Circle.*Square"):
        drawing(shape={})


def test_a_module_that_fails_to_import_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_component.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="importing broken_component failed: No module named 'no_such_dependency'"):
        drawing(shape={"_target_": "broken_component.Circle"})


def test_a_component_from_another_package_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_component.py").write_text(
        f"from dataclasses import dataclass\nfrom {HERE} import Circle\n"
        "@dataclass(frozen=True, kw_only=True, slots=True)\nclass Ring(Circle):\n    hole: float = 0.5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = drawing(shape={"_target_": "outside_component.Ring", "radius": 1})
    assert type(made.shape).__name__ == "Ring"
    assert to_plain(made)["shape"]["_target_"] == "outside_component.Ring"


def test_the_exponent_trap_of_plain_yaml_is_explained() -> None:
    text = "radius: 1e-3"
    assert strict_object(Circle, OmegaConf.to_container(OmegaConf.create(text))) == Circle(radius=0.001)
    with pytest.raises(
        ConfigError, match=r"^radius='1e-3' is text, .*: write 0\.001 \(plain YAML reads 1e-3 as text\)"
    ):
        strict_object(Circle, yaml.safe_load(text))


def test_messages_at_the_root_have_no_prefix() -> None:
    with pytest.raises(ConfigError, match=r"^unknown key widht; did you mean 'width'"):
        strict_object(Pen, {"widht": 1})
    with pytest.raises(ConfigError, match=r"^config=3 is an integer"):
        strict_object(Pen, 3)  # type: ignore[arg-type]


def test_a_field_type_that_no_config_can_hold_is_our_own_mistake() -> None:
    @dataclass
    class Wrong:
        values: set[int]

    with pytest.raises(TypeError, match="values: a config field cannot be of type"):
        strict_object(Wrong, {"values": [1]})


def test_plain_is_the_inverse_through_json() -> None:
    made = drawing(
        others=[circle(1), {"_target_": f"{HERE}.Square"}],
        named={"a": {"_target_": f"{HERE}.Square"}},
        spare=circle(3),
        points=[[1, 2.5]],
        folder="some/where",
        notes={"free": [1]},
    )
    plain = to_plain(made)
    assert strict_object(Drawing, json.loads(json.dumps(plain))) == made
    assert plain["_target_"] == f"{HERE}.Drawing"
    assert "_target_" not in to_plain(made, Drawing)
    assert "_target_" not in plain["pen"]
    assert plain["spare"]["_target_"] == f"{HERE}.Circle"
    assert plain["others"][1]["_target_"] == f"{HERE}.Square"


def test_what_has_no_plain_form_is_refused() -> None:
    with pytest.raises(TypeError, match="has no plain form"):
        to_plain({"x": object()})
