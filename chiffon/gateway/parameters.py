"""What holds for the parameters of all routes: none is ignored."""

from fastapi import Request

from chiffon.contract.fields import shortened
from chiffon.gateway.problems import ProblemError


def once(request: Request) -> None:
    """Refuse a parameter that is given twice, where only one can count."""
    names = [name for name, _ in request.query_params.multi_items() if name != "capabilities"]
    for name in names:
        if names.count(name) > 1:
            raise ProblemError(400, "invalid_request", f"{shortened(name)}: given more than once")


def no_parameters(request: Request) -> None:
    """Refuse any parameter, for routes that have none."""
    for name in request.query_params:
        raise ProblemError(400, "invalid_request", f"{shortened(name)}: unknown parameter")
