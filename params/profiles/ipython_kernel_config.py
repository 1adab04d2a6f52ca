# `make setup` puts this where the environment's kernels read it. Every kernel warns that it listens on this machine's
# loopback, and each that is shut down may log the interrupt that this begins with: a hundred times in a study.
c = get_config()  # noqa: F821
c.IPKernelApp.log_level = "ERROR"
c.IPKernelApp.logging_config = {
    "filters": {"shutdown": {"()": lambda: lambda record: "KeyboardInterrupt caught" not in record.getMessage()}},
    "handlers": {"console": {"filters": ["shutdown"]}},
}
