"""Models of students: asked for, checked, built, trained with a loss inside, handed out."""
