"""What a hostile peer sends, over every way to receive it."""
