"""Options from the command line and their types."""

import math

import pytest

from vlmq.options import EXPECTED, check_types, parse_options

GOOD = {
    bool: [(True, True)],
    int: [(3, 3), (0, 0)],
    float: [(0.5, 0.5), (2, 2.0)],
    str: [("data", "data")],
    float | None: [(None, None), (1, 1.0)],
    tuple[float, ...]: [([1, 0.9], (1.0, 0.9)), ((0.5,), (0.5,))],
}
BAD = {
    bool: [1, "true", None],
    int: [1.0, True, "1"],
    float: ["0.5", True, None, math.nan, math.inf, [0.5]],
    str: [1, None],
    float | None: ["null", False, math.nan],
    tuple[float, ...]: [[], 1.0, ["1"], [math.nan], [True]],
}


def test_parse_options_reads_json_values():
    texts = ["damp=0.05", "act_order=false", "scale_factors=[1, 0.9]", 'labels="a=b"', "clip=null"]
    assert parse_options(texts) == {
        "damp": 0.05,
        "act_order": False,
        "scale_factors": [1, 0.9],
        "labels": "a=b",
        "clip": None,
    }


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["damp"], "--option 'damp': expected NAME=JSON, such as --option damp=0.05"),
        (["=1"], "expected NAME=JSON"),
        (["damp="], "'' is no JSON; expected a number"),
        (["labels=data"], "'data' is no JSON; expected .* a text as \"data\""),
        (["damp=1", "damp=2"], "damp is given twice"),
    ],
)
def test_parse_options_names_the_text_that_is_wrong(texts, message):
    with pytest.raises(ValueError, match=message):
        parse_options(texts)


@pytest.mark.parametrize("kind", EXPECTED, ids=str)
def test_check_types_takes_what_is_declared_and_nothing_else(kind):
    for given, expected in GOOD[kind]:
        checked = check_types({"x": given}, {"x": kind}, "solver 'y'")["x"]
        assert checked == expected
        assert type(checked) is type(expected)
    for given in BAD[kind]:
        with pytest.raises(TypeError, match="solver 'y': option x expects "):
            check_types({"x": given}, {"x": kind}, "solver 'y'")


def test_check_types_lists_the_known_names():
    with pytest.raises(ValueError, match="solver 'y' takes no b, c; known: a"):
        check_types({"c": 1, "b": 1}, {"a": int}, "solver 'y'")
    with pytest.raises(ValueError, match="solver 'y' takes no b; it has no options"):
        check_types({"b": 1}, {}, "solver 'y'")
