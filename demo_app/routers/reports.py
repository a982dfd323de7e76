"""Reports: too heavy for a request, so a worker computes them."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException, status

from demo_app import jobs
from demo_app.database import SessionDep
from demo_app.models import Report
from demo_app.schemas import Accepted, ReportOut

router = APIRouter(prefix="/reports", tags=["reports"])


@router.post("", status_code=status.HTTP_202_ACCEPTED)
async def order_report(session: SessionDep) -> Accepted:
    """Ask for a report on the turnover."""
    report = Report(kind="turnover")
    session.add(report)
    await session.commit()
    await jobs.publish(jobs.build_report, report.id)
    return Accepted(id=str(report.id), jobs=1)


@router.get("/{report_id}")
async def get_report(report_id: int, session: SessionDep) -> ReportOut:
    """Return a report; its result is empty until a worker is done."""
    report = await session.get(Report, report_id)
    if report is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "no such report")
    return ReportOut.model_validate(report)
