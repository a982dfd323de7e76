"""Mail: campaigns go through a queue, behind everything that somebody waits for."""

from __future__ import annotations

import asyncio
import uuid

from fastapi import APIRouter, Query, status
from sqlalchemy import select

from demo_app import jobs
from demo_app.database import SessionDep
from demo_app.faults import strikes
from demo_app.models import Mail
from demo_app.paging import page_of
from demo_app.schemas import Accepted, Campaign, MailOut, Page, PagingDep

router = APIRouter(prefix="/mail", tags=["mail"])


@router.post("/campaigns", status_code=status.HTTP_202_ACCEPTED)
async def start_campaign(campaign: Campaign) -> Accepted:
    """Send a mail to each recipient."""
    campaign_id = uuid.uuid4().hex[:12]
    mails = [(f"{campaign_id}:{recipient}", recipient) for recipient in dict.fromkeys(campaign.recipients)]
    if strikes("queue_backlog"):  # a loop that forgot to end
        mails = [(f"{key}:{n}", recipient) for n in range(5) for key, recipient in mails]
    await asyncio.gather(
        *(jobs.publish(jobs.send_mail, key, who, campaign.subject, priority=jobs.BULK) for key, who in mails)
    )
    return Accepted(id=campaign_id, jobs=len(mails))


@router.get("")
async def list_mails(session: SessionDep, paging: PagingDep, recipient_id: int = Query(gt=0)) -> Page[MailOut]:
    """List the mails that a user was sent, a page at a time."""
    return await page_of(session, select(Mail).where(Mail.recipient_id == recipient_id), Mail.id, paging, MailOut)
