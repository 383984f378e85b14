# SPDX-License-Identifier: Apache-2.0
"""Measurements, one question per file, and the demo; each runs as `python -m razor_attention.bench.<name>`."""
