"""What the demo's conversations are made from: tools, everyday chats, and the sorting skill. Pure Python."""
