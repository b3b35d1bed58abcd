"""The museum's one switch: put a wrong function where a right one was, and put it back."""

import contextlib


@contextlib.contextmanager
def substituted(replacements: list[tuple]):
    """Within the `with` block each owner's function is replaced; afterwards it is as before.

    replacements: (owner, name, wrong) each; the owner is the module or class whose code looks the
    name up. The trainers know nothing of this: the mistake is switched on from outside.

    Example: with substituted([(ppo, "gae", wrong_gae)]): ppo.main(cfg)
    """
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    try:
        for owner, name, wrong in replacements:
            setattr(owner, name, wrong)
        yield
    finally:
        for owner, name, right in saved:
            setattr(owner, name, right)


def ignore(*anything) -> None:
    """Stands for a check that a program without checks does not make."""
