"""The fp32 reference: short torch code that says what each kernel means. Tests import it."""
