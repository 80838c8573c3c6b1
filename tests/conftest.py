"""Under pytest, and only there, beartype holds every jaxtyping shape of the package."""

from jaxtyping import install_import_hook

install_import_hook("llm_analysis", "typecheck.check")
