"""Names that a newcomer gives: what other programs say for four bits, and names of another family."""

import pytest

from quantkit.errors import RecipeError
from quantkit.recipe.schema import recipe_of


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"scheme": "w4"}, "unknown scheme 'w4'; did you mean 'w4a16'? known: "),
        ({"scheme": "int4"}, "did you mean 'w4a16'?"),
        ({"scheme": "uint8"}, "did you mean 'w8a16'?"),
        ({"scheme": "4bit"}, "did you mean 'w4a16'?"),
        ({"scheme": "8-bits"}, "did you mean 'w8a16'?"),
        ({"scheme": "INT3"}, "did you mean 'w3a16'?"),
        ({"scheme": "w2"}, "did you mean 'w2a16-asym'?"),
        ({"scheme": "nf5"}, "did you mean 'nf4'?"),
        ({"scheme": "awq"}, "unknown scheme 'awq'; it is the name of a step, which goes under steps; known: "),
        ({"scheme": "gptq"}, "it is the name of a quantizer, which goes under method;"),
        ({"method": "awq"}, "unknown quantizer 'awq'; it is the name of a step, which goes under steps; known: autoround"),
        ({"method": "smoothquant"}, "it is the name of a step, which goes under steps;"),
        ({"method": "w4a16"}, "it is the name of a scheme, which goes under scheme;"),
        ({"method": "gptk"}, "unknown quantizer 'gptk'; did you mean 'gptq'?"),
        ({"steps": ["gptq"]}, "unknown step 'gptq'; it is the name of a quantizer, which goes under method; known: awq"),
        ({"steps": ["rotat"]}, "did you mean 'rotate'?"),
    ],
)
def test_the_advice_is_what_was_meant(settings, advice):
    with pytest.raises(RecipeError) as caught:
        recipe_of({"model": "demo", "output": {"path": "q"}, **settings})
    assert advice in str(caught.value)
