-- A new task. KEYS[1] its snapshot.
-- ARGV: org, id, event, rows, submission, body hash ('' without an idempotency key).
-- Answers ok · duplicate (this very submission) · cached (same idempotency key, same body) · mismatch · exists.
local org, id = ARGV[3], ARGV[4]
local found = load(org, id)
if found then
  local answer = 'exists'
  if found.submission == ARGV[7] then
    answer = 'duplicate'
  elseif ARGV[8] ~= '' and found.body_hash then
    answer = found.body_hash == ARGV[8] and 'cached' or 'mismatch'
  end
  return { answer, found.last_seq, found.last_event_id, found.created_at, found.status, found.attempt }
end
-- A reused id goes on where the deleted task ended, so that an old cursor or fence can never mean a new thing.
local grave = redis.call('HMGET', key('tombstone', org .. ':' .. id), 'last_seq', 'fence', 'submission', 'created_at')
if ARGV[7] ~= '' and grave[3] == ARGV[7] then return { 'duplicate', grave[1], '', grave[4], 'gone', '0' } end
local fields = {}
if grave[1] then fields = { last_seq = grave[1], fence = grave[2] } end
local plan = {
  org = org, id = id, fields = fields, change = row(ARGV[6], 'new'), type = 'submitted', event = ARGV[5], n = '',
}
prepare(plan)
write(plan)
return done(plan)
