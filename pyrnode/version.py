"""The version, where what stands below the public names can read it."""

VERSION = "0.1.0"
