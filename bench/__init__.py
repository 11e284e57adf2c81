"""The benchmark room: ``python -m bench`` runs it, ``python -m bench.report`` makes the page."""
