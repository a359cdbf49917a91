"""Options of the whole test suite."""


def pytest_addoption(parser):
    parser.addoption(
        "--require-comfyui",
        action="store_true",
        help="fail, instead of skip, the tests that need a real ComfyUI (or its browser) where none is found",
    )
