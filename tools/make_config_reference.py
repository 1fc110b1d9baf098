"""Write docs/config.md from the config schema: python tools/make_config_reference.py"""

from pathlib import Path

from distpc.config.reference import config_reference

if __name__ == "__main__":
    target = Path(__file__).parent.parent / "docs" / "config.md"
    target.write_text(config_reference(), encoding="utf-8")
    print(f"wrote {target}")
