"""Generation through a cache. The package itself can be called: ``memjax.generate(model, prompts, ...)``."""

import sys
import types


class _CallablePackage(types.ModuleType):
    """``memjax.generate`` is a folder and, to its users, a function; a package that can be called is both."""

    def __call__(self, model, prompts, **options):
        """Generates for one prompt or a batch of them, see ``memjax.generate.loop.generate``."""
        from memjax.generate.loop import generate

        return generate(model, prompts, **options)


sys.modules[__name__].__class__ = _CallablePackage
