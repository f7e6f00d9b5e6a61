"""Before any training: how teacher and student do on the data, how far apart they are, what a step costs, and whether
distillation is likely to pay."""

from limbeck.outlook.facts import Cost, Outlook, Side, Words
from limbeck.outlook.look import look, recipe_of
from limbeck.outlook.verdict import lines

__all__ = ["Cost", "Outlook", "Side", "Words", "lines", "look", "recipe_of"]
