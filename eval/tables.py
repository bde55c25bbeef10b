"""Moved to vqrae.common.files."""

from vqrae.common.files import markdown_table as markdown_table
