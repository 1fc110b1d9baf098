"""The families of input distributions: which ones there are, and what each is good for.

A new family is a module of its own with a bank (see `inputs.CategoricalBank` for what a bank
offers) and one row here; the tests of truth then run on it without being told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distpc.circuits.bank import Bank
from distpc.circuits.binomial import BinomialBank
from distpc.circuits.gaussian import GaussianBank
from distpc.circuits.indicator import IndicatorBank
from distpc.circuits.inputs import CategoricalBank
from distpc.circuits.logistic import LogisticBank
from distpc.circuits.schedule import BankPlan
from distpc.errors import StructureError
from distpc.structures.region_graph import Region

BAGGED = "categorical"
"""Products of inputs of this family alone are looked up at once, as one bag of table rows."""


@dataclass(frozen=True)
class Family:
    """What a family needs of its variable.

    Attributes:
        build: its bank for a plan.
        is_real: whether values are real numbers; else they are categories 0 .. C - 1.
        num_categories: C, where the family is for one C only.
        units_are_categories: whether unit k belongs to category k, so that there are C units.
        same_as: the family that it is, with a demand of its own.
    """

    build: Callable[[BankPlan], Bank]
    is_real: bool = False
    num_categories: int | None = None
    units_are_categories: bool = False
    same_as: str | None = None


def _categorical(plan: BankPlan) -> Bank:
    return CategoricalBank(plan.sizes, plan.num_units)


FAMILIES: dict[str, Family] = {
    "categorical": Family(_categorical),
    "bernoulli": Family(_categorical, num_categories=2, same_as="categorical"),
    "binomial": Family(lambda plan: BinomialBank(plan.sizes, plan.num_units)),
    "logistic": Family(lambda plan: LogisticBank(plan.sizes, plan.num_units)),
    "indicator": Family(
        lambda plan: IndicatorBank(plan.sizes, plan.num_units), units_are_categories=True
    ),
    "gaussian": Family(lambda plan: GaussianBank(len(plan.owners), plan.num_units), is_real=True),
}


def build_bank(plan: BankPlan) -> Bank:
    """The bank of input regions."""
    return FAMILIES[plan.kind].build(plan)


def family_of(region: Region, num_categories: int | None) -> str:
    """The family of an input region over a variable of that many categories (None: real).

    A Bernoulli input is a categorical one: they share folds.

    Raises:
        StructureError: an unknown family, or one that does not fit its variable.
    """
    name = region.family or ("gaussian" if num_categories is None else "categorical")
    family = FAMILIES.get(name)
    where = f"input region of variable {region.variable}"
    if family is None:
        raise StructureError(
            "there is no such family of inputs",
            where=where,
            found=name,
            expected=", ".join(sorted(FAMILIES)),
        )
    found = "a real variable" if num_categories is None else f"{num_categories} categories"
    if family.is_real != (num_categories is None):
        expected = "a real variable" if family.is_real else "a variable with categories"
    elif family.num_categories not in (None, num_categories):
        expected = f"{family.num_categories} categories"
    elif family.units_are_categories and region.num_units != num_categories:
        found, expected = f"{region.num_units} units", f"{num_categories} units, one a category"
    else:
        return family.same_as or name
    raise StructureError(
        f"a variable does not fit the family '{name}'", where=where, found=found, expected=expected
    )
