"""Example models; part of the package, so that the demo runs wherever it is installed."""
