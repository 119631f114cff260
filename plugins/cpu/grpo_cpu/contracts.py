"""The version of the contracts that the offers of this plugin were written for, as data."""

CONTRACT = 1
