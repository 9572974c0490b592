"""One config, read key by key: values are checked, and the keys that were not understood are told."""

from typing import Any

from sim.errors import InputError, shown
from sim.model.keys import KEYS, speaks
from sim.model.spec import MAX_LAYERS

# Keys of one field that mean several things.
_FREE_TO_DIFFER = ("activation", "any_width", "has_bias", "types", "pattern")


class Reader:
    """The keys of one config: each is taken once, and what is left and speaks of experts is told. `where` begins the message of
    an error; `notes` say what was assumed or not understood, for `ModelSpec.unverified`.
    """

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self.config, self.where, self.notes = config, where, list[str]()
        self._used, self._odd = set[str](), set[str]()

    def has(self, field: str) -> bool:
        """Whether any key of a field is there and not null."""
        return any(self.config.get(key) is not None for key in KEYS[field])

    def take(self, field: str) -> tuple[str, Any]:
        """Key and value that are preferred for a field, ('', None) if there are none; others that differ are noted."""
        found = [(key, self.config[key]) for key in KEYS[field] if self.config.get(key) is not None]
        self._used.update(KEYS[field])
        if not found:
            return "", None
        key, value = found[0]
        for other, differs in found[1:]:
            if differs != value and field not in _FREE_TO_DIFFER and not isinstance(differs, list | dict):
                self.notes.append(f"{other} {shown(differs)} ({key} {shown(value)} was taken)")
        return key, value

    def use(self, *keys: str) -> None:
        """Keys that are understood."""
        self._used.update(keys)

    def odd(self, key: str) -> None:
        """A known key whose value is not understood."""
        self._odd.add(key)

    def whole(self, field: str, least: int = 0, most: int = 2**40) -> int | None:
        """A whole number, None if there is none or false; a list with a value for each layer must repeat one value."""
        key, value = self.take(field)
        if isinstance(value, list):
            counts = {shown(item) for item in value if item not in (0, None)}
            if len(value) > MAX_LAYERS or len(counts) != 1:
                raise self.error(f"{key} {shown(value)} differs from layer to layer, which is not modelled")
            value = next(item for item in value if item not in (0, None))
        return None if value is None or value is False else self.checked(key, value, least, most)

    def checked(self, key: str, value: Any, least: int = 0, most: int = MAX_LAYERS) -> int:
        """A value as a whole number of a range, or an error that names its key."""
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            told = f"'{shown(value)}'" if isinstance(value, str) else shown(value)
            raise self.error(f"{key} must be a whole number from {least} to {most}, not {told}")
        return value

    def flag(self, field: str) -> bool | None:
        """True or False, None if there is neither."""
        key, value = self.take(field)
        if value not in (None, True, False) or isinstance(value, float):
            raise self.error(f"{key} must be true or false, not {shown(value)}")
        return None if value is None else bool(value)

    def error(self, text: str) -> InputError:
        """An error of this config."""
        return InputError(f"{self.where}: {text}")

    def left_over(self) -> list[str]:
        """Odd ones, and those that speak of MoE, experts, routing, sparse or dense layers and were not taken; switched-off ones
        left out.
        """
        told = (key for key, value in self.config.items() if key not in self._used and speaks(key, value))
        return sorted(self._odd.union(told))
