"""Users and what they write."""

from __future__ import annotations

from fastapi import APIRouter, Depends, HTTPException, status
from sqlalchemy import select
from sqlalchemy.orm import selectinload

from demo_app.database import SessionDep
from demo_app.faults import strikes
from demo_app.models import Post, User
from demo_app.paging import page_of
from demo_app.schemas import Page, PagingDep, PostIn, PostOut, UserOut, UserWithPosts


async def _fail_at_times() -> None:
    """Raise every second time while the fault ``error_burst`` is on."""
    if strikes("error_burst", share=0.5):
        raise RuntimeError("the profile could not be read")


router = APIRouter(prefix="/users", tags=["users"], dependencies=[Depends(_fail_at_times)])


@router.get("")
async def list_users(session: SessionDep, paging: PagingDep) -> Page[UserWithPosts]:
    """List users with their posts: two statements, however many users (``selectinload``)."""
    if strikes("n_plus_one"):
        return await _read_one_by_one(session, paging)
    return await page_of(session, select(User).options(selectinload(User.posts)), User.id, paging, UserWithPosts)


async def _read_one_by_one(session: SessionDep, paging: PagingDep) -> Page[UserWithPosts]:
    """Read each user's posts by a statement of its own, as the fault ``n_plus_one`` does."""
    page = await page_of(session, select(User), User.id, paging, UserOut)
    users = []
    for user in page.items:
        posts = await session.scalars(select(Post).where(Post.user_id == user.id))
        users.append(UserWithPosts(**user.model_dump(), posts=[PostOut.model_validate(post) for post in posts]))
    return Page(items=users, next_after=page.next_after)


@router.get("/{user_id}")
async def get_user(user_id: int, session: SessionDep) -> UserOut:
    """Return a user."""
    user = await session.get(User, user_id)
    if user is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "no such user")
    return UserOut.model_validate(user)


@router.get("/{user_id}/posts")
async def list_posts(user_id: int, session: SessionDep, paging: PagingDep) -> Page[PostOut]:
    """List what a user wrote, a page at a time."""
    return await page_of(session, select(Post).where(Post.user_id == user_id), Post.id, paging, PostOut)


@router.post("/{user_id}/posts", status_code=status.HTTP_201_CREATED)
async def write_post(user_id: int, post: PostIn, session: SessionDep) -> PostOut:
    """Add a post."""
    if await session.get(User, user_id) is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "no such user")
    row = Post(user_id=user_id, title=post.title, body=post.body)
    session.add(row)
    await session.commit()
    return PostOut.model_validate(row)
