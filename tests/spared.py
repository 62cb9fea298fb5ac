"""Work of torch and of Triton that no test looks at, left out: it took a quarter of the suite's time."""

import dataclasses
import functools
import sys


def compiler(guards):
    """The time that guards take, measured for a log: caches of 256 MiB are flushed before, once a compiled frame."""
    guards.profile_guard_manager = lambda *_: 0.0


def interpreter(module):
    """Overflows, looked for on behalf of an assertion that is off; the language, prepared again at every inner call."""
    builder = module.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    module._patch_lang = once_a_launch(module._patch_lang)


def once_a_launch(prepare):
    """`prepare`, for functions of one module once until a launch ends, which is when what it returns is restored."""
    ready = {}

    @functools.wraps(prepare)
    def prepared(fn):
        key = id(fn.__globals__)
        if key not in ready:
            ready[key] = Scope(prepare(fn), ready)
        return ready[key]

    return prepared


class Scope:
    """What a preparation changed; a launch that restores it ends the others that happened inside."""

    def __init__(self, changes, ready):
        self.changes, self.ready = changes, ready

    def restore(self):
        self.ready.clear()
        self.changes.restore()


WAYS = {"torch._dynamo.guards": compiler, "triton.runtime.interpreter": interpreter}


def spare():
    """Leave out the work of what is imported by now."""
    for name in WAYS.keys() & sys.modules.keys():
        WAYS.pop(name)(sys.modules[name])
