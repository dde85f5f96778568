"""The version, for whoever may not import the package's face."""

VERSION = "1.1.0"
