"""Hostile input at the three doors: the right result, or an error of the right type that names its cause."""

import pytest
from doors import make_class_pipeline, make_text_pipeline
from public_calls import VALUES, public_calls


@pytest.fixture(scope="module")
def calls():
    return public_calls(make_text_pipeline(), make_class_pipeline())


@pytest.mark.parametrize("name", sorted(public_calls(make_text_pipeline(), make_class_pipeline())))
def test_every_argument_takes_every_kind_of_value_or_refuses_it_by_name(calls, name):
    call = calls[name]
    problems = {(key, value): call.judge({key: value}) for key in call.valid for value in VALUES}
    assert not {key: problem for key, problem in problems.items() if problem}
