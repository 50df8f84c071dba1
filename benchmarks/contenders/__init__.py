"""What a user would write or pick instead of chiffon, each as a process of its own.

Each does the job as its own documentation shows it, with the pools and prefetch that suit it.
"""
